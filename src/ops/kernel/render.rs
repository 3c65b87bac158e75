//! The template language of `shaders/`, described in the parent.

/// Fills a source in for one variant.
pub(super) fn render(source: &str, values: &[(&str, String)], flags: &[&str]) -> String {
    fn block(
        lines: &mut std::slice::Iter<&str>,
        values: &[(&str, String)],
        flags: &[&str],
        out: &mut String,
    ) -> String {
        while let Some(&line) = lines.next() {
            let mut line = line.to_owned();
            for (name, value) in values {
                line = line.replace(&format!("{{{{ {name} }}}}"), value);
            }
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                ["#if", flag] => {
                    let (mut then, mut otherwise) = (String::new(), String::new());
                    if block(lines, values, flags, &mut then) == "#else" {
                        block(lines, values, flags, &mut otherwise);
                    }
                    out.push_str(if flags.contains(flag) { &then } else { &otherwise });
                }
                ["#for", name, "in", items @ ..] => {
                    assert!(!items.is_empty(), "a shader repeats something for each {name} of nothing");
                    let start = lines.clone();
                    for item in items {
                        *lines = start.clone();
                        // Before the others, as it may be part of their names.
                        let mut values = values.to_vec();
                        values.insert(0, (name, (*item).to_owned()));
                        block(lines, &values, flags, out);
                    }
                }
                [end @ ("#else" | "#endif" | "#endfor")] => return (*end).to_owned(),
                _ => {
                    out.push_str(&line);
                    out.push('\n');
                }
            }
        }
        String::new()
    }
    let lines: Vec<_> = source.lines().collect();
    let mut out = String::with_capacity(4 * source.len());
    let end = block(&mut lines.iter(), values, flags, &mut out);
    assert!(end.is_empty(), "a shader has an {end} without its beginning");
    assert!(!out.contains("{{"), "a shader has a placeholder without a value:\n{out}");
    out
}
