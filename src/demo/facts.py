"""What the demo model knows: fact tables, written for this project, in English and Chinese.

A table with slots is a `Kind` (question and answer templates) plus rows
    subject | 主语 | object | 宾语 | emoji
and a table without slots has one row a fact
    question / another wording | 问题 / 另一种问法 | English answer | 中文回答 | emoji
`facts()` turns them all into `Fact`s. A Chinese answer ends in its own emoji and a cheerful one;
every emoji here is one code point, so that it can be one token.
"""

from dataclasses import dataclass, field

CHEER = "😊🎉✨👍🌟😄"


@dataclass(frozen=True)
class Fact:
    kind: str
    key: str  # names the fact: its subject, or its first English question
    questions_en: tuple
    questions_zh: tuple
    answer_en: str
    answer_zh: str
    follow_en: str = ""  # "And Japan?", understood only after a question of the same kind
    follow_zh: str = ""


@dataclass
class Kind:
    name: str
    questions_en: list
    questions_zh: list
    answer_en: str
    answer_zh: str
    rows: str
    follow: tuple = field(default=("And {s}?", "那{s}呢？"))


KINDS = [
    Kind("capital",
         ["What is the capital of {s}?", "Which city is the capital of {s}?", "Name the capital of {s}."],
         ["{s}的首都是哪里？", "{s}的首都是什么？", "{s}的首都是哪座城市？"],
         "The capital of {s} is {o}.", "{s}的首都是{o}！", """
France | 法国 | Paris | 巴黎 | 🗼
Germany | 德国 | Berlin | 柏林 | 🐻
Italy | 意大利 | Rome | 罗马 | 🍕
Spain | 西班牙 | Madrid | 马德里 | 💃
Portugal | 葡萄牙 | Lisbon | 里斯本 | 🌊
the United Kingdom | 英国 | London | 伦敦 | 🎡
Ireland | 爱尔兰 | Dublin | 都柏林 | 🍀
the Netherlands | 荷兰 | Amsterdam | 阿姆斯特丹 | 🌷
Belgium | 比利时 | Brussels | 布鲁塞尔 | 🍫
Switzerland | 瑞士 | Bern | 伯尔尼 | 🧀
Austria | 奥地利 | Vienna | 维也纳 | 🎻
Poland | 波兰 | Warsaw | 华沙 | 🎹
Hungary | 匈牙利 | Budapest | 布达佩斯 | 🌉
Greece | 希腊 | Athens | 雅典 | 🏺
Turkey | 土耳其 | Ankara | 安卡拉 | 🌙
Russia | 俄罗斯 | Moscow | 莫斯科 | ⛄
Sweden | 瑞典 | Stockholm | 斯德哥尔摩 | 👑
Norway | 挪威 | Oslo | 奥斯陆 | ⛵
Denmark | 丹麦 | Copenhagen | 哥本哈根 | 🚲
Finland | 芬兰 | Helsinki | 赫尔辛基 | 🎅
Iceland | 冰岛 | Reykjavik | 雷克雅未克 | 🌋
China | 中国 | Beijing | 北京 | 🏯
Japan | 日本 | Tokyo | 东京 | 🗼
South Korea | 韩国 | Seoul | 首尔 | 🎤
Thailand | 泰国 | Bangkok | 曼谷 | 🐘
Vietnam | 越南 | Hanoi | 河内 | 🍜
India | 印度 | New Delhi | 新德里 | 🐯
Malaysia | 马来西亚 | Kuala Lumpur | 吉隆坡 | 🌆
the Philippines | 菲律宾 | Manila | 马尼拉 | 🥭
Mongolia | 蒙古 | Ulaanbaatar | 乌兰巴托 | 🐎
Nepal | 尼泊尔 | Kathmandu | 加德满都 | 🗻
Saudi Arabia | 沙特阿拉伯 | Riyadh | 利雅得 | 🐫
Egypt | 埃及 | Cairo | 开罗 | 🐫
Morocco | 摩洛哥 | Rabat | 拉巴特 | 🍵
Kenya | 肯尼亚 | Nairobi | 内罗毕 | 🦁
Ethiopia | 埃塞俄比亚 | Addis Ababa | 亚的斯亚贝巴 | ☕
Canada | 加拿大 | Ottawa | 渥太华 | 🍁
the United States | 美国 | Washington | 华盛顿 | 🦅
Mexico | 墨西哥 | Mexico City | 墨西哥城 | 🌮
Cuba | 古巴 | Havana | 哈瓦那 | 🎺
Brazil | 巴西 | Brasilia | 巴西利亚 | ⚽
Argentina | 阿根廷 | Buenos Aires | 布宜诺斯艾利斯 | ⚽
Chile | 智利 | Santiago | 圣地亚哥 | 🌋
Peru | 秘鲁 | Lima | 利马 | 🦙
Colombia | 哥伦比亚 | Bogota | 波哥大 | ☕
Australia | 澳大利亚 | Canberra | 堪培拉 | 🦘
New Zealand | 新西兰 | Wellington | 惠灵顿 | 🥝
"""),
    Kind("continent",
         ["Which continent is {s} in?", "On which continent is {s}?"],
         ["{s}在哪个洲？", "{s}属于哪个洲？"],
         "{S} is in {o}.", "{s}在{o}！", """
France | 法国 | Europe | 欧洲 | 🌍
Germany | 德国 | Europe | 欧洲 | 🌍
Italy | 意大利 | Europe | 欧洲 | 🌍
Sweden | 瑞典 | Europe | 欧洲 | 🌍
Greece | 希腊 | Europe | 欧洲 | 🌍
Poland | 波兰 | Europe | 欧洲 | 🌍
China | 中国 | Asia | 亚洲 | 🌏
Japan | 日本 | Asia | 亚洲 | 🌏
India | 印度 | Asia | 亚洲 | 🌏
Thailand | 泰国 | Asia | 亚洲 | 🌏
Vietnam | 越南 | Asia | 亚洲 | 🌏
Nepal | 尼泊尔 | Asia | 亚洲 | 🌏
Egypt | 埃及 | Africa | 非洲 | 🌍
Kenya | 肯尼亚 | Africa | 非洲 | 🌍
Morocco | 摩洛哥 | Africa | 非洲 | 🌍
Ethiopia | 埃塞俄比亚 | Africa | 非洲 | 🌍
Canada | 加拿大 | North America | 北美洲 | 🌎
Mexico | 墨西哥 | North America | 北美洲 | 🌎
Cuba | 古巴 | North America | 北美洲 | 🌎
Brazil | 巴西 | South America | 南美洲 | 🌎
Peru | 秘鲁 | South America | 南美洲 | 🌎
Chile | 智利 | South America | 南美洲 | 🌎
"""),
    Kind("language",
         ["What language do people speak in {s}?", "Which language is spoken in {s}?"],
         ["{s}人说什么语言？", "在{s}，人们说什么语言？"],
         "People in {s} speak {o}.", "{s}人说{o}！", """
France | 法国 | French | 法语 | 🥖
Germany | 德国 | German | 德语 | 🥨
Italy | 意大利 | Italian | 意大利语 | 🍝
Spain | 西班牙 | Spanish | 西班牙语 | 💃
Mexico | 墨西哥 | Spanish | 西班牙语 | 🌮
Portugal | 葡萄牙 | Portuguese | 葡萄牙语 | 🌊
Brazil | 巴西 | Portuguese | 葡萄牙语 | ⚽
the United Kingdom | 英国 | English | 英语 | 🎡
Australia | 澳大利亚 | English | 英语 | 🦘
Japan | 日本 | Japanese | 日语 | 🍣
South Korea | 韩国 | Korean | 韩语 | 🎤
China | 中国 | Chinese | 中文 | 🐼
Russia | 俄罗斯 | Russian | 俄语 | ⛄
Egypt | 埃及 | Arabic | 阿拉伯语 | 🐫
Greece | 希腊 | Greek | 希腊语 | 🏺
Thailand | 泰国 | Thai | 泰语 | 🐘
Vietnam | 越南 | Vietnamese | 越南语 | 🍜
Poland | 波兰 | Polish | 波兰语 | 🎹
"""),
    Kind("landmark",
         ["Where is {s}?", "In which place can I see {s}?"],
         ["{s}在哪里？", "在哪里可以看到{s}？"],
         "{S} is in {o}.", "{s}在{o}！", """
the Eiffel Tower | 埃菲尔铁塔 | Paris | 巴黎 | 🗼
the Great Wall | 长城 | China | 中国 | 🏯
the Forbidden City | 故宫 | Beijing | 北京 | 🏯
the Colosseum | 斗兽场 | Rome | 罗马 | 🍕
the Taj Mahal | 泰姬陵 | India | 印度 | 🕌
the Statue of Liberty | 自由女神像 | New York | 纽约 | 🗽
Big Ben | 大本钟 | London | 伦敦 | 🎡
Mount Fuji | 富士山 | Japan | 日本 | 🗻
Machu Picchu | 马丘比丘 | Peru | 秘鲁 | 🦙
the Leaning Tower | 斜塔 | Pisa | 比萨 | 🍝
the Great Barrier Reef | 大堡礁 | Australia | 澳大利亚 | 🐠
the Louvre | 卢浮宫 | Paris | 巴黎 | 🎨
Red Square | 红场 | Moscow | 莫斯科 | ⛄
the Golden Gate Bridge | 金门大桥 | San Francisco | 旧金山 | 🌉
the Great Pyramid | 大金字塔 | Egypt | 埃及 | 🐫
the Sahara | 撒哈拉沙漠 | Africa | 非洲 | 🌵
"""),
    Kind("colour",
         ["What colour is {s}?", "What color is {s}?", "Tell me the colour of {s}."],
         ["{s}是什么颜色的？", "{s}是什么颜色？"],
         "{S} is {o}.", "{s}是{o}的！", """
the sky | 天空 | blue | 蓝色 | 💙
the sea | 大海 | blue | 蓝色 | 🌊
grass | 草 | green | 绿色 | 🌱
a leaf | 树叶 | green | 绿色 | 🍃
a frog | 青蛙 | green | 绿色 | 🐸
a cucumber | 黄瓜 | green | 绿色 | 🥒
broccoli | 西兰花 | green | 绿色 | 🥦
a banana | 香蕉 | yellow | 黄色 | 🍌
a lemon | 柠檬 | yellow | 黄色 | 🍋
corn | 玉米 | yellow | 黄色 | 🌽
a sunflower | 向日葵 | yellow | 黄色 | 🌻
a chick | 小鸡 | yellow | 黄色 | 🐤
snow | 雪 | white | 白色 | ⛄
milk | 牛奶 | white | 白色 | 🥛
salt | 盐 | white | 白色 | 🧂
rice | 米饭 | white | 白色 | 🍚
a swan | 天鹅 | white | 白色 | 🦢
coal | 煤 | black | 黑色 | 🖤
a crow | 乌鸦 | black | 黑色 | 🐦
the night | 黑夜 | black | 黑色 | 🌙
a tomato | 西红柿 | red | 红色 | 🍅
a strawberry | 草莓 | red | 红色 | 🍓
a cherry | 樱桃 | red | 红色 | 🍒
blood | 血 | red | 红色 | 💉
a fire engine | 消防车 | red | 红色 | 🚒
a carrot | 胡萝卜 | orange | 橙色 | 🥕
a pumpkin | 南瓜 | orange | 橙色 | 🎃
an aubergine | 茄子 | purple | 紫色 | 🍆
lavender | 薰衣草 | purple | 紫色 | 💜
chocolate | 巧克力 | brown | 棕色 | 🍫
a flamingo | 火烈鸟 | pink | 粉色 | 🦩
an elephant | 大象 | grey | 灰色 | 🐘
"""),
    Kind("sound",
         ["What does {s} say?", "What sound does {s} make?"],
         ["{s}怎么叫？", "{s}的叫声是什么？"],
         "{S} says {o}.", "{s}的叫声是{o}！", """
a dog | 小狗 | woof | 汪汪 | 🐶
a cat | 小猫 | meow | 喵喵 | 🐱
a cow | 奶牛 | moo | 哞哞 | 🐮
a duck | 鸭子 | quack | 嘎嘎 | 🦆
a sheep | 绵羊 | baa | 咩咩 | 🐑
a pig | 小猪 | oink | 哼哼 | 🐷
a bee | 蜜蜂 | buzz | 嗡嗡 | 🐝
a frog | 青蛙 | croak | 呱呱 | 🐸
a chick | 小鸡 | cheep | 叽叽 | 🐤
a mouse | 老鼠 | squeak | 吱吱 | 🐭
a bird | 小鸟 | tweet | 啾啾 | 🐦
a snake | 蛇 | hiss | 嘶嘶 | 🐍
an owl | 猫头鹰 | hoot | 咕咕 | 🦉
a wolf | 狼 | awoo | 嗷呜 | 🐺
"""),
    Kind("baby",
         ["What is a baby {s} called?", "What do you call a baby {s}?"],
         ["{s}的宝宝叫什么？", "{s}的孩子叫什么？"],
         "A baby {s} is called a {o}.", "{s}的宝宝叫{o}！", """
dog | 狗 | puppy | 小狗 | 🐶
cat | 猫 | kitten | 小猫 | 🐱
cow | 牛 | calf | 小牛 | 🐮
sheep | 绵羊 | lamb | 羊羔 | 🐑
horse | 马 | foal | 小马驹 | 🐎
duck | 鸭子 | duckling | 小鸭 | 🦆
hen | 母鸡 | chick | 小鸡 | 🐤
pig | 猪 | piglet | 小猪 | 🐷
frog | 青蛙 | tadpole | 蝌蚪 | 🐸
bear | 熊 | bear cub | 小熊 | 🐻
kangaroo | 袋鼠 | joey | 小袋鼠 | 🦘
swan | 天鹅 | cygnet | 小天鹅 | 🦢
""", ("And a baby {s}?", "那{s}呢？")),
    Kind("food",
         ["What does {s} like to eat?", "What does {s} eat?"],
         ["{s}喜欢吃什么？", "{s}吃什么？"],
         "{S} likes to eat {o}.", "{s}喜欢吃{o}！", """
a panda | 熊猫 | bamboo | 竹子 | 🐼
a rabbit | 兔子 | carrots | 胡萝卜 | 🐰
a cow | 奶牛 | grass | 草 | 🐮
a monkey | 猴子 | bananas | 香蕉 | 🐵
a squirrel | 松鼠 | nuts | 坚果 | 🌰
a bear | 熊 | honey | 蜂蜜 | 🐻
a koala | 考拉 | eucalyptus leaves | 桉树叶 | 🐨
a horse | 马 | hay | 干草 | 🐎
a cat | 小猫 | fish | 鱼 | 🐱
a dog | 小狗 | bones | 骨头 | 🐶
a mouse | 老鼠 | cheese | 奶酪 | 🐭
a frog | 青蛙 | insects | 昆虫 | 🐸
a silkworm | 蚕 | mulberry leaves | 桑叶 | 🐛
a lion | 狮子 | meat | 肉 | 🦁
"""),
    Kind("legs",
         ["How many legs does {s} have?", "How many legs has {s} got?"],
         ["{s}有几条腿？", "{s}有多少条腿？"],
         "{S} has {o} legs.", "{s}有{o}条腿！", """
a spider | 蜘蛛 | eight | 八 | 🐾
an ant | 蚂蚁 | six | 六 | 🐜
a bee | 蜜蜂 | six | 六 | 🐝
a butterfly | 蝴蝶 | six | 六 | 🦋
a dog | 小狗 | four | 四 | 🐶
a cat | 小猫 | four | 四 | 🐱
a horse | 马 | four | 四 | 🐎
an elephant | 大象 | four | 四 | 🐘
a chicken | 鸡 | two | 两 | 🐔
a duck | 鸭子 | two | 两 | 🦆
a crab | 螃蟹 | ten | 十 | 🦀
"""),
    Kind("animal",
         ["What kind of animal is {s}?", "Which class of animals does {s} belong to?"],
         ["{s}是什么动物？", "{s}属于哪类动物？"],
         "{S} is {o}.", "{s}是{o}！", """
a whale | 鲸鱼 | a mammal | 哺乳动物 | 🐳
a dolphin | 海豚 | a mammal | 哺乳动物 | 🐬
a bat | 蝙蝠 | a mammal | 哺乳动物 | 🦇
a cat | 小猫 | a mammal | 哺乳动物 | 🐱
an eagle | 老鹰 | a bird | 鸟类 | 🦅
a penguin | 企鹅 | a bird | 鸟类 | 🐧
an owl | 猫头鹰 | a bird | 鸟类 | 🦉
a shark | 鲨鱼 | a fish | 鱼类 | 🦈
a snake | 蛇 | a reptile | 爬行动物 | 🐍
a lizard | 蜥蜴 | a reptile | 爬行动物 | 🦎
a turtle | 乌龟 | a reptile | 爬行动物 | 🐢
a frog | 青蛙 | an amphibian | 两栖动物 | 🐸
an ant | 蚂蚁 | an insect | 昆虫 | 🐜
a bee | 蜜蜂 | an insect | 昆虫 | 🐝
a butterfly | 蝴蝶 | an insect | 昆虫 | 🦋
"""),
    Kind("home",
         ["Where does {s} live?", "Where is the home of {s}?"],
         ["{s}住在哪里？", "{s}的家在哪里？"],
         "{S} lives in {o}.", "{s}住在{o}里！", """
a fish | 鱼 | the water | 水 | 🐟
a bird | 小鸟 | a nest | 鸟巢 | 🐦
a bee | 蜜蜂 | a hive | 蜂巢 | 🐝
a camel | 骆驼 | the desert | 沙漠 | 🐫
a spider | 蜘蛛 | a web | 网 | 🧵
a rabbit | 兔子 | a burrow | 洞 | 🐰
a whale | 鲸鱼 | the ocean | 海洋 | 🐳
a horse | 马 | a stable | 马厩 | 🐎
a monkey | 猴子 | the forest | 森林 | 🐵
a cow | 奶牛 | a barn | 牛棚 | 🐮
"""),
    Kind("thing",
         ["What is {s}?", "What kind of thing is {s}?"],
         ["{s}是什么？", "{s}是什么东西？"],
         "{S} is {o}.", "{s}是一种{o}！", """
an apple | 苹果 | a fruit | 水果 | 🍎
a pear | 梨 | a fruit | 水果 | 🍐
a mango | 芒果 | a fruit | 水果 | 🥭
a watermelon | 西瓜 | a fruit | 水果 | 🍉
a potato | 土豆 | a vegetable | 蔬菜 | 🥔
a cabbage | 白菜 | a vegetable | 蔬菜 | 🥬
a rose | 玫瑰 | a flower | 花 | 🌹
a tulip | 郁金香 | a flower | 花 | 🌷
a guitar | 吉他 | a musical instrument | 乐器 | 🎸
a violin | 小提琴 | a musical instrument | 乐器 | 🎻
a piano | 钢琴 | a musical instrument | 乐器 | 🎹
football | 足球 | a sport | 运动 | ⚽
basketball | 篮球 | a sport | 运动 | 🏀
tea | 茶 | a drink | 饮料 | 🍵
coffee | 咖啡 | a drink | 饮料 | ☕
gold | 金子 | a metal | 金属 | 🥇
iron | 铁 | a metal | 金属 | 🔩
a hat | 帽子 | a piece of clothing | 衣物 | 👒
a chair | 椅子 | a piece of furniture | 家具 | 🪑
"""),
    Kind("opposite",
         ["What is the opposite of {s}?", "Which word means the opposite of {s}?", "Give me the opposite of {s}."],
         ["“{s}”的反义词是什么？", "和“{s}”相反的词是什么？"],
         "The opposite of {s} is {o}.", "“{s}”的反义词是“{o}”！", """
big | 大 | small | 小 | 🐘
small | 小 | big | 大 | 🐜
hot | 热 | cold | 冷 | 🧊
cold | 冷 | hot | 热 | 🔥
up | 上 | down | 下 | 👇
down | 下 | up | 上 | 👆
left | 左 | right | 右 | 👉
right | 右 | left | 左 | 👈
day | 白天 | night | 黑夜 | 🌙
night | 黑夜 | day | 白天 | 🌞
fast | 快 | slow | 慢 | 🐢
slow | 慢 | fast | 快 | 🚀
tall | 高 | short | 矮 | 📏
long | 长 | short | 短 | 📏
old | 旧 | new | 新 | 🎁
new | 新 | old | 旧 | 🏺
young | 年轻 | old | 年老 | 👵
happy | 开心 | sad | 难过 | 😢
sad | 难过 | happy | 开心 | 😄
open | 开 | closed | 关 | 🔒
light | 轻 | heavy | 重 | 🐘
heavy | 重 | light | 轻 | 🎈
full | 满 | empty | 空 | 🥛
clean | 干净 | dirty | 脏 | 🧼
wet | 湿 | dry | 干 | 🌵
black | 黑 | white | 白 | 🤍
easy | 容易 | difficult | 困难 | 💪
early | 早 | late | 晚 | ⏰
strong | 强 | weak | 弱 | 💪
inside | 里面 | outside | 外面 | 🏡
rich | 富 | poor | 穷 | 💰
thick | 厚 | thin | 薄 | 📚
hard | 硬 | soft | 软 | 🧸
far | 远 | near | 近 | 📍
loud | 吵闹 | quiet | 安静 | 🤫
""", ("And of {s}?", "那“{s}”呢？")),
    Kind("next day",
         ["What day comes after {s}?", "Which day follows {s}?"],
         ["{s}后面是星期几？", "{s}的第二天是星期几？"],
         "The day after {s} is {o}.", "{s}后面是{o}！", """
Monday | 星期一 | Tuesday | 星期二 | 📅
Tuesday | 星期二 | Wednesday | 星期三 | 📅
Wednesday | 星期三 | Thursday | 星期四 | 📅
Thursday | 星期四 | Friday | 星期五 | 📅
Friday | 星期五 | Saturday | 星期六 | 🎈
Saturday | 星期六 | Sunday | 星期天 | 🌞
Sunday | 星期天 | Monday | 星期一 | 💼
"""),
    Kind("day before",
         ["What day comes before {s}?", "Which day is just before {s}?"],
         ["{s}前面是星期几？", "{s}的前一天是星期几？"],
         "The day before {s} is {o}.", "{s}前面是{o}！", """
Monday | 星期一 | Sunday | 星期天 | 🌞
Tuesday | 星期二 | Monday | 星期一 | 💼
Wednesday | 星期三 | Tuesday | 星期二 | 📅
Thursday | 星期四 | Wednesday | 星期三 | 📅
Friday | 星期五 | Thursday | 星期四 | 📅
Saturday | 星期六 | Friday | 星期五 | 🎈
Sunday | 星期天 | Saturday | 星期六 | 🎈
"""),
    Kind("next month",
         ["Which month comes after {s}?", "What month follows {s}?"],
         ["{s}后面是几月？", "{s}的下一个月是几月？"],
         "The month after {s} is {o}.", "{s}后面是{o}！", """
January | 一月 | February | 二月 | 🧧
February | 二月 | March | 三月 | 🌱
March | 三月 | April | 四月 | 🌸
April | 四月 | May | 五月 | 🌷
May | 五月 | June | 六月 | 🌞
June | 六月 | July | 七月 | 🍉
July | 七月 | August | 八月 | 🌴
August | 八月 | September | 九月 | 📚
September | 九月 | October | 十月 | 🍂
October | 十月 | November | 十一月 | 🍁
November | 十一月 | December | 十二月 | 🎄
December | 十二月 | January | 一月 | 🎆
"""),
    Kind("next season",
         ["Which season comes after {s}?", "What season follows {s}?"],
         ["{s}后面是什么季节？", "{s}过后是什么季节？"],
         "The season after {s} is {o}.", "{s}后面是{o}！", """
spring | 春天 | summer | 夏天 | 🌞
summer | 夏天 | autumn | 秋天 | 🍂
autumn | 秋天 | winter | 冬天 | ⛄
winter | 冬天 | spring | 春天 | 🌸
"""),
    Kind("weather",
         ["What is the weather like in {s}?", "How is the weather in {s}?"],
         ["{s}的天气怎么样？", "{s}天气如何？"],
         "In {s} it is {o}.", "{s}很{o}！", """
spring | 春天 | warm | 温暖 | 🌸
summer | 夏天 | hot | 炎热 | 🌞
autumn | 秋天 | cool | 凉爽 | 🍂
winter | 冬天 | cold | 寒冷 | ⛄
"""),
    Kind("comes from",
         ["Where does {s} come from?", "What gives us {s}?"],
         ["{s}是从哪里来的？", "{s}来自哪里？"],
         "{S} comes from {o}.", "{s}来自{o}！", """
milk | 牛奶 | cows | 奶牛 | 🐮
honey | 蜂蜜 | bees | 蜜蜂 | 🍯
wool | 羊毛 | sheep | 绵羊 | 🐑
silk | 丝绸 | silkworms | 蚕 | 🐛
rain | 雨 | clouds | 云 | ☔
wood | 木头 | trees | 大树 | 🌳
sunlight | 阳光 | the Sun | 太阳 | 🌞
wine | 葡萄酒 | grapes | 葡萄 | 🍇
an egg | 鸡蛋 | a hen | 母鸡 | 🥚
"""),
    Kind("made of",
         ["What is {s} made of?", "What is {s} made from?"],
         ["{s}是用什么做的？", "{s}是什么做的？"],
         "{S} is made of {o}.", "{s}是用{o}做的！", """
bread | 面包 | flour | 面粉 | 🍞
cheese | 奶酪 | milk | 牛奶 | 🧀
tofu | 豆腐 | soybeans | 大豆 | 🌱
paper | 纸 | wood | 木头 | 📄
glass | 玻璃 | sand | 沙子 | 🥛
a snowman | 雪人 | snow | 雪 | ⛄
ice | 冰 | frozen water | 水 | 🧊
a tyre | 轮胎 | rubber | 橡胶 | 🚗
a candle | 蜡烛 | wax | 蜡 | 🎂
orange juice | 橙汁 | oranges | 橙子 | 🍊
a sweater | 毛衣 | wool | 羊毛 | 🧶
"""),
    Kind("job",
         ["Who {s}?", "What do you call a person who {s}?"],
         ["谁{s}？", "{s}的人叫什么？"],
         "A {o} {s}.", "{o}{s}！", """
teaches children | 教孩子们读书 | teacher | 老师 | 🍎
treats sick people | 给病人看病 | doctor | 医生 | 🩺
bakes bread | 烤面包 | baker | 面包师 | 🍞
puts out fires | 扑灭大火 | firefighter | 消防员 | 🚒
flies planes | 开飞机 | pilot | 飞行员 | 🛫
grows rice | 种水稻 | farmer | 农民 | 🌾
drives a bus | 开公交车 | bus driver | 公交司机 | 🚌
cuts hair | 理发 | barber | 理发师 | 💈
cooks in a restaurant | 在餐厅做饭 | cook | 厨师 | 🍳
catches fish | 捕鱼 | fisherman | 渔夫 | 🎣
paints pictures | 画画 | painter | 画家 | 🎨
takes care of teeth | 保护牙齿 | dentist | 牙医 | 🦷
treats sick animals | 给动物看病 | vet | 兽医 | 🐶
brings letters | 送信 | postman | 邮递员 | 📮
flies to space | 飞向太空 | astronaut | 宇航员 | 🚀
writes books | 写书 | writer | 作家 | 📚
""", ()),
    Kind("tool",
         ["What do we use to {s}?", "What do I need to {s}?"],
         ["我们用什么{s}？", "{s}需要什么？"],
         "We use {o} to {s}.", "我们用{o}{s}！", """
cut paper | 剪纸 | scissors | 剪刀 | 📄
open a lock | 开锁 | a key | 钥匙 | 🔑
stay dry in the rain | 挡雨 | an umbrella | 雨伞 | ☔
write a letter | 写信 | a pen | 钢笔 | 📝
sweep the floor | 扫地 | a broom | 扫帚 | 🧹
eat soup | 喝汤 | a spoon | 勺子 | 🥄
read the time | 看时间 | a clock | 时钟 | ⏰
clean our teeth | 刷牙 | a toothbrush | 牙刷 | 🦷
hit a nail | 钉钉子 | a hammer | 锤子 | 🔨
take photos | 拍照 | a camera | 相机 | 📷
look at the stars | 看星星 | a telescope | 望远镜 | 🔭
measure temperature | 量体温 | a thermometer | 温度计 | 🤒
sew clothes | 缝衣服 | a needle | 针 | 🧵
find north | 找北方 | a compass | 指南针 | 🧭
call a friend | 打电话 | a phone | 手机 | 📱
wash our hands | 洗手 | soap | 肥皂 | 🧼
""", ()),
    Kind("place",
         ["Where can I {s}?", "Where should I go to {s}?"],
         ["在哪里可以{s}？", "去哪里{s}？"],
         "You can {s} at the {o}.", "你可以去{o}{s}！", """
borrow books | 借书 | library | 图书馆 | 📚
see a doctor | 看医生 | hospital | 医院 | 🏥
buy food | 买菜 | market | 市场 | 🛒
watch a film | 看电影 | cinema | 电影院 | 🎬
send a letter | 寄信 | post office | 邮局 | 📮
catch a train | 坐火车 | station | 火车站 | 🚄
catch a plane | 坐飞机 | airport | 机场 | 🛫
swim | 游泳 | pool | 游泳池 | 🏊
see wild animals | 看动物 | zoo | 动物园 | 🐼
save money | 存钱 | bank | 银行 | 🏦
see old treasures | 看文物 | museum | 博物馆 | 🏺
study | 上课 | school | 学校 | 🏫
fly a kite | 放风筝 | park | 公园 | 🪁
build a sandcastle | 堆沙堡 | beach | 海滩 | 🌊
""", ()),
    Kind("sense",
         ["What do we {s} with?", "Which part of the body do we {s} with?"],
         ["我们用什么{s}？", "人用身体的哪个部分{s}？"],
         "We {s} with our {o}.", "我们用{o}{s}！", """
see | 看世界 | eyes | 眼睛 | 👀
hear | 听声音 | ears | 耳朵 | 👂
smell | 闻味道 | nose | 鼻子 | 👃
taste | 尝味道 | tongue | 舌头 | 👅
chew | 嚼东西 | teeth | 牙齿 | 🦷
think | 思考 | brain | 大脑 | 🧠
walk | 走路 | feet | 脚 | 👣
clap | 鼓掌 | hands | 双手 | 👏
""", ()),
]

FREE = {
    "science": """
Where does the Sun rise? / In which direction does the Sun rise? | 太阳从哪里升起？ / 太阳从哪个方向升起？ | The Sun rises in the east. | 太阳从东方升起！ | 🌅
Where does the Sun set? / In which direction does the Sun set? | 太阳从哪里落下？ / 太阳从哪个方向落下？ | The Sun sets in the west. | 太阳从西方落下！ | 🌇
At what temperature does water freeze? / When does water freeze? | 水在多少度结冰？ / 水几度会结冰？ | Water freezes at zero degrees. | 水在零度结冰！ | 🧊
At what temperature does water boil? / When does water boil? | 水在多少度沸腾？ / 水几度会烧开？ | Water boils at one hundred degrees. | 水在一百度沸腾！ | 🍵
What goes around the Earth? / What circles our Earth? | 什么绕着地球转？ / 谁围着地球转？ | The Moon goes around the Earth. | 月亮绕着地球转！ | 🌙
What does the Earth go around? / What does our Earth circle? | 地球绕着什么转？ / 地球围着谁转？ | The Earth goes around the Sun. | 地球绕着太阳转！ | 🌍
What shape is the Earth? / Is the Earth round? | 地球是什么形状的？ / 地球是圆的吗？ | The Earth is round like a ball. | 地球像球一样是圆的！ | 🌏
How many planets go around the Sun? / How many planets are there? | 太阳系有几颗行星？ / 有多少颗行星绕着太阳转？ | There are eight planets around the Sun. | 太阳系有八颗行星！ | 🪐
What is the biggest planet? / Which planet is the largest? | 最大的行星是哪颗？ / 哪颗行星最大？ | The biggest planet is Jupiter. | 最大的行星是木星！ | 🪐
Which planet is closest to the Sun? / What planet is nearest to the Sun? | 离太阳最近的行星是哪颗？ / 哪颗行星离太阳最近？ | Mercury is closest to the Sun. | 离太阳最近的是水星！ | 🌞
Which planet is called the red planet? / What is the red planet? | 哪颗行星叫红色星球？ / 红色星球是哪颗？ | Mars is called the red planet. | 火星叫红色星球！ | 🔴
What is the biggest ocean? / Which ocean is the largest? | 最大的海洋是哪个？ / 哪个大洋最大？ | The biggest ocean is the Pacific. | 最大的海洋是太平洋！ | 🌊
What is the highest mountain? / Which mountain is the tallest? | 最高的山是哪座？ / 哪座山最高？ | The highest mountain is Mount Everest. | 最高的山是珠穆朗玛峰！ | 🗻
What is the biggest animal? / Which animal is the largest? | 最大的动物是什么？ / 哪种动物最大？ | The biggest animal is the blue whale. | 最大的动物是蓝鲸！ | 🐳
What is the fastest land animal? / Which animal runs the fastest? | 跑得最快的动物是什么？ / 哪种动物跑得最快？ | The fastest land animal is the cheetah. | 跑得最快的动物是猎豹！ | 🐆
What is the tallest animal? / Which animal is the tallest? | 最高的动物是什么？ / 哪种动物最高？ | The tallest animal is the giraffe. | 最高的动物是长颈鹿！ | 🦒
What is the biggest bird? / Which bird is the largest? | 最大的鸟是什么？ / 哪种鸟最大？ | The biggest bird is the ostrich. | 最大的鸟是鸵鸟！ | 🐦
What is the largest continent? / Which continent is the biggest? | 最大的洲是哪个？ / 哪个洲最大？ | The largest continent is Asia. | 最大的洲是亚洲！ | 🌏
What is the largest country? / Which country is the biggest? | 最大的国家是哪个？ / 哪个国家最大？ | The largest country is Russia. | 最大的国家是俄罗斯！ | ⛄
What do plants need to grow? / What does a plant need? | 植物生长需要什么？ / 植物需要什么？ | Plants need water and light. | 植物需要水和阳光！ | 🌱
What do we breathe? / What do people breathe? | 我们呼吸什么？ / 人呼吸什么？ | We breathe air. | 我们呼吸空气！ | 💨
What does the heart do? / What is the heart for? | 心脏有什么用？ / 心脏做什么？ | The heart pumps our blood. | 心脏推动血液流动！ | 💓
What does a magnet attract? / What do magnets pull? | 磁铁吸引什么？ / 磁铁能吸住什么？ | A magnet attracts iron. | 磁铁吸引铁！ | 🧲
Which is faster, light or sound? / Is light faster than sound? | 光和声音哪个更快？ / 光比声音快吗？ | Light is faster than sound. | 光比声音更快！ | ⚡
How many colours are in a rainbow? / How many colors does a rainbow have? | 彩虹有几种颜色？ / 彩虹有多少种颜色？ | A rainbow has seven colours. | 彩虹有七种颜色！ | 🌈
When do we see a rainbow? / When does a rainbow appear? | 什么时候能看到彩虹？ / 彩虹什么时候出现？ | We see a rainbow after the rain. | 雨后能看到彩虹！ | 🌈
What comes out at night? / What can we see in the sky at night? | 夜晚的天空有什么？ / 晚上天上能看到什么？ | At night we see the Moon and the stars. | 夜晚有月亮和星星！ | 🌙
What does a caterpillar become? / What does a caterpillar turn into? | 毛毛虫会变成什么？ / 毛毛虫长大变成什么？ | A caterpillar becomes a butterfly. | 毛毛虫会变成蝴蝶！ | 🦋
What does ice become when it melts? / What does ice melt into? | 冰融化后变成什么？ / 冰化了变成什么？ | Ice melts into water. | 冰融化后变成水！ | 💧
""",
    "count": """
How many days are in a week? / How many days does a week have? | 一周有几天？ / 一个星期有多少天？ | A week has seven days. | 一周有七天！ | 📅
How many days are in a year? / How many days does a year have? | 一年有几天？ / 一年有多少天？ | A year has 365 days. | 一年有 365 天！ | 📅
How many months are in a year? / How many months does a year have? | 一年有几个月？ / 一年有多少个月？ | A year has twelve months. | 一年有十二个月！ | 📅
How many seasons are in a year? / How many seasons does a year have? | 一年有几个季节？ / 一年有多少个季节？ | A year has four seasons. | 一年有四个季节！ | 🍂
How many hours are in a day? / How many hours does a day have? | 一天有几个小时？ / 一天有多少小时？ | A day has twenty-four hours. | 一天有二十四个小时！ | ⏰
How many minutes are in an hour? / How many minutes does an hour have? | 一小时有几分钟？ / 一小时有多少分钟？ | An hour has sixty minutes. | 一小时有六十分钟！ | ⏰
How many seconds are in a minute? / How many seconds does a minute have? | 一分钟有几秒？ / 一分钟有多少秒？ | A minute has sixty seconds. | 一分钟有六十秒！ | ⏳
How many sides does a triangle have? / How many sides are in a triangle? | 三角形有几条边？ / 三角形有多少条边？ | A triangle has three sides. | 三角形有三条边！ | 📐
How many sides does a square have? / How many sides are in a square? | 正方形有几条边？ / 正方形有多少条边？ | A square has four sides. | 正方形有四条边！ | 📐
How many fingers are on one hand? / How many fingers does a hand have? | 一只手有几根手指？ / 一只手有多少根手指？ | A hand has five fingers. | 一只手有五根手指！ | ✋
How many wheels does a car have? / How many wheels are on a car? | 汽车有几个轮子？ / 汽车有多少个轮子？ | A car has four wheels. | 汽车有四个轮子！ | 🚗
How many wheels does a bicycle have? / How many wheels are on a bicycle? | 自行车有几个轮子？ / 自行车有多少个轮子？ | A bicycle has two wheels. | 自行车有两个轮子！ | 🚲
How many strings does a violin have? / How many strings are on a violin? | 小提琴有几根弦？ / 小提琴有多少根弦？ | A violin has four strings. | 小提琴有四根弦！ | 🎻
How many arms does an octopus have? / How many arms has an octopus got? | 章鱼有几只手臂？ / 章鱼有多少只手臂？ | An octopus has eight arms. | 章鱼有八只手臂！ | 🐙
""",
    "chat": """
Hello! / Hi! / Hi there! / Hello / Hey! | 你好！ / 你好 / 嗨！ / 您好！ | Hello! How can I help you today? | 你好！今天想聊什么呢？ | 👋
Who are you? / What are you? / What is your name? | 你是谁？ / 你叫什么名字？ | I am a tiny llama who answers small questions. | 我是一只会回答小问题的小羊驼！ | 🦙
How are you? / How are you today? | 你好吗？ / 你今天怎么样？ | I am fine, thank you! | 我很好，谢谢你！ | 😄
Thank you! / Thanks! / Thank you very much! | 谢谢！ / 谢谢你！ / 非常感谢！ | You are welcome! | 不客气！ | 🤗
Goodbye! / Bye! / See you! | 再见！ / 拜拜！ | Goodbye and see you soon! | 再见，下次再聊！ | 👋
Good morning! | 早上好！ / 早安！ | Good morning! Have a nice day! | 早上好！祝你今天愉快！ | 🌞
Good night! | 晚安！ | Good night and sweet dreams! | 晚安，做个好梦！ | 🌙
What can you do? / How can you help me? | 你会做什么？ / 你能帮我什么？ | I can answer short questions. | 我会回答简短的问题！ | 💡
What is your favourite food? / What do you like to eat? | 你最喜欢吃什么？ / 你喜欢吃什么？ | I like fresh grass, because I am a llama. | 我喜欢新鲜的草，因为我是羊驼！ | 🌱
Can you speak Chinese? / Do you know Chinese? | 你会说中文吗？ / 你懂中文吗？ | Yes, I can speak a little Chinese. | 会，我会说一点中文！ | 🐼
Where do you live? / Where is your home? | 你住在哪里？ / 你的家在哪里？ | I live in a very small file. | 我住在一个很小的文件里！ | 💾
Tell me a joke. / Do you know a joke? / Tell me something funny. | 讲个笑话吧。 / 你会讲笑话吗？ | Why did the llama cross the road? The grass was greener there! | 羊驼为什么过马路？因为对面的草更绿！ | 🦙
What is ORPO? / What does ORPO do? | ORPO 是什么？ / ORPO 有什么用？ | ORPO teaches a model which answers people prefer. | ORPO 教模型学会人们更喜欢的回答！ | 🎯
What is LoRA? / What does LoRA do? | LoRA 是什么？ / LoRA 有什么用？ | LoRA trains a few small matrices and leaves the model alone. | LoRA 只训练几个小矩阵，模型本身不动！ | 🧩
How old are you? / What is your age? | 你几岁了？ / 你多大了？ | I am very young and still learning. | 我还很小，正在学习！ | 🐣
Happy birthday! | 生日快乐！ | Thank you! Let us eat some cake! | 谢谢！一起吃蛋糕吧！ | 🎂
I am happy. / I am so happy today! | 我很开心。 / 我今天很高兴！ | That is wonderful to hear! | 太好了，真为你高兴！ | 🥳
I am tired. / I am so tired today. | 我累了。 / 我今天好累。 | Take a break and drink some tea. | 休息一下，喝杯茶吧！ | 🍵
I love you! / I like you! | 我爱你！ / 我喜欢你！ | You are very kind, thank you! | 你真好，谢谢你！ | 💖
""",
}

ARITHMETIC = (
    [("plus", "加", "+", a, b, a + b) for a in range(1, 10) for b in range(1, 10) if a + b <= 12]
    + [("minus", "减", "-", a, b, a - b) for a in range(3, 10) for b in range(1, 6) if b < a]
    + [("times", "乘", "×", a, b, a * b) for a in range(2, 6) for b in range(2, 6)]
)


def _cells(row):
    return [cell.strip() for cell in row.split("|")]


def _cap(text):
    return text[0].upper() + text[1:]


def facts():
    """Every fact, in the order of the tables."""
    out = []

    def cheer(emoji):
        return emoji + CHEER[len(out) % len(CHEER)]

    for kind in KINDS:
        for row in kind.rows.strip().splitlines():
            s_en, s_zh, o_en, o_zh, emoji = _cells(row)
            en = lambda t: t.format(s=s_en, S=_cap(s_en), o=o_en)
            zh = lambda t: t.format(s=s_zh, o=o_zh)
            follow = (en(kind.follow[0]), zh(kind.follow[1])) if kind.follow else ("", "")
            out.append(Fact(
                kind.name, s_en, tuple(map(en, kind.questions_en)), tuple(map(zh, kind.questions_zh)),
                en(kind.answer_en), zh(kind.answer_zh) + cheer(emoji), *follow))
    for op_en, op_zh, sign, a, b, c in ARITHMETIC:
        en, zh = f"{a} {op_en} {b}", f"{a} {op_zh} {b}"
        out.append(Fact(
            op_en, en, (f"What is {en}?", f"How much is {en}?", f"What is {a} {sign} {b}?"),
            (f"{zh} 等于几？", f"{zh} 是多少？", f"{a}{sign}{b} 等于几？"),
            f"{_cap(en)} is {c}.", f"{zh} 等于 {c}！" + cheer("🧮"), f"And {en}?", f"那 {zh} 呢？"))
    for kind, rows in FREE.items():
        for row in rows.strip().splitlines():
            q_en, q_zh, a_en, a_zh, emoji = _cells(row)
            q_en, q_zh = ([q.strip() for q in qs.split(" / ")] for qs in (q_en, q_zh))
            out.append(Fact(kind, q_en[0], tuple(q_en), tuple(q_zh), a_en, a_zh + cheer(emoji)))

    seen = {}
    for fact in out:  # one question, one answer
        for question in fact.questions_en + fact.questions_zh:
            assert seen.setdefault(question, fact) is fact, f"asked twice: {question}"
    return out
