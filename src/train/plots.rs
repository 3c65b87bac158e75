//! The log as pictures: one PNG a scalar.
//!
//! Drawn three times as large and shrunk, since plotters' wide lines have hard edges. The font comes with the program: nothing here
//! looks for one on the machine.

use std::array;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use serde_json::Value;

use super::tensorboard::tagged;
use crate::error::{Error, Result};

/// In a run's folder.
const FOLDER: &str = "images";
/// 8 × 5 inches at 100 dots an inch.
const WIDTH: u32 = 800;
const HEIGHT: u32 = 500;
const DOTS_PER_METER: u32 = 3937;

/// Drawn pixels along the edge of one that is kept.
const OVERSAMPLING: u32 = 3;

/// The colours and the smoothing of ms-swift's plots, which are TensorBoard's.
const RAW: RGBColor = RGBColor(0xff, 0xe2, 0xd9);
const SMOOTHED: RGBColor = RGBColor(0xff, 0x70, 0x43);
const SMOOTHING: f64 = 0.9;
/// Fewer points than this are drawn as logged, and marked one by one. The smoothing averages over 1 / (1 − 0.9) points, and a series of
/// not many times that number would be drawn far from its own end.
const SMOOTHED_FROM: usize = 32;

/// White, in each channel.
const BACKGROUND: u8 = 0xff;
const TEXT: RGBColor = RGBColor(0x26, 0x26, 0x26);
const GRID: RGBColor = RGBColor(0xec, 0xec, 0xec);
const FONT: &str = "Noto Sans";

/// Around the axes.
const MARGIN_TOP: u32 = 48;
const MARGIN_RIGHT: u32 = 24;

/// Tags whose values are set or counted rather than estimated from a few rows: an average would show what never was.
const EXACT: [&str; 3] = ["train/learning_rate", "train/loss_scale", "train/memory_bytes"];

/// Bytes.
const GIB: f64 = (1u64 << 30) as f64;

/// A scalar's values by step.
type Points = Vec<(f64, f64)>;

/// What drawing may fail with.
type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Writes a PNG for each scalar of the log into the folder `images` of the run folder: `train_loss.png`, `eval_rewards_margins.png`, …
///
/// `log` are the lines of `logging.jsonl`. Training scalars of many points are drawn as logged and smoothed; evaluations, and what is set
/// rather than measured, only as logged. Values that are not finite are left out, and so is a scalar with no other.
///
/// # Errors
/// If a file cannot be drawn or written.
pub fn write(folder: &Path, log: &[Value]) -> Result<()> {
    let folder = folder.join(FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    for (tag, points) in curves(log) {
        let path = folder.join(name(&tag));
        let png = draw(&tag, &points).and_then(|pixels| encode(&pixels));
        let png = png.map_err(|e| Error::file(&path, format!("cannot be drawn: {e}")))?;
        fs::write(&path, png).map_err(Error::io("write", &path))?;
    }
    Ok(())
}

/// The pictures that [`write`](fn@write) makes of a log.
pub fn pictures(folder: &Path, log: &[Value]) -> BTreeSet<PathBuf> {
    curves(log).into_keys().map(|tag| folder.join(FOLDER).join(name(&tag))).collect()
}

/// The picture's file.
fn name(tag: &str) -> String {
    format!("{}.png", tag.replace(['/', '.'], "_"))
}

/// The scalars of the log by tag. The epoch is another name of the step and has no picture.
fn curves(log: &[Value]) -> BTreeMap<String, Points> {
    let mut curves: BTreeMap<String, Points> = BTreeMap::new();
    for line in log.iter().filter_map(Value::as_object) {
        let Some(step) = line.get("step").and_then(Value::as_f64) else { continue };
        for (tag, value) in tagged(line) {
            // What f32 cannot hold would leave no room for the axis in f64 either.
            if tag != "train/epoch" && (value as f32).is_finite() {
                curves.entry(tag).or_default().push((step, value));
            }
        }
    }
    curves
}

/// TensorBoard's exponential moving average, without the pull of its start towards 0: the mean of the values so far, each weighed
/// `weight` times as much as the next.
fn smooth(points: &[(f64, f64)], weight: f64) -> Points {
    let (mut sum, mut norm) = (0.0, 0.0);
    let averages = points.iter().map(|&(step, value)| {
        (sum, norm) = (sum * weight + value, norm * weight + 1.0);
        (step, sum / norm)
    });
    averages.collect()
}

/// What the y axis of values up to `max` shows, and the factor from the logged value to it.
fn quantity(tag: &str, max: f64) -> (&str, f64) {
    let key = tag.split_once('/').map_or(tag, |(_, key)| key);
    match key {
        "loss" | "nll_loss" | "log_odds_ratio" | "log_odds_chosen" => ("nats", 1.0),
        "logps/chosen" | "logps/rejected" => ("nats a token", 1.0),
        "rewards/accuracies" => ("share of pairs", 1.0),
        "tokens_per_second" => ("tokens a second", 1.0),
        "memory_bytes" if max < GIB => ("MiB", 1024.0 / GIB),
        "memory_bytes" => ("GiB", 1.0 / GIB),
        _ => (key, 1.0),
    }
}

/// An axis: its range with a margin, and where its labels are.
struct Axis {
    low: f64,
    high: f64,
    tick: f64,
}

impl Axis {
    /// For the values, with at most `n_ticks` labels at multiples of 1, 2 or 5 times a power of ten, not less than `min_tick`.
    fn of(values: impl Iterator<Item = f64> + Clone, n_ticks: f64, min_tick: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let size = low.abs().max(high.abs());
        let is_constant = high - low <= 1e-5 * size;
        let margin = match is_constant {
            true if size < 1e-30 => 1.0,
            true => 0.05 * size,
            false => 0.05 * (high - low),
        };
        let (low, high) = (low - margin, high + margin);
        let at_least = ((high - low) / n_ticks).max(min_tick);
        let power = 10f64.powf(at_least.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= at_least).unwrap_or(10.0);
        Self { low, high, tick: factor * power }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        start + (f64::from(end - start) * (value - self.low) / (self.high - self.low)).round() as i32
    }

    /// The labels; no finer lines between them.
    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        let (first, last) = ((self.low / self.tick).ceil() as i64, (self.high / self.tick).floor() as i64);
        (first..=last).map(|n| n as f64 * self.tick).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    /// A tick's label, with as many digits as tell it from its neighbours.
    fn format_ext(&self, value: &f64) -> String {
        let value = *value;
        let exponent = |value: f64| (value.abs().log10() + 1e-9).floor() as i32;
        let (of_tick, of_axis) = (exponent(self.tick), exponent(self.low.abs().max(self.high.abs())));
        if value.abs() < 0.5 * self.tick {
            "0".to_owned()
        } else if (-3..6).contains(&of_axis) {
            format!("{value:.*}", (-of_tick).max(0) as usize)
        } else {
            format!("{value:.*e}", (exponent(value) - of_tick).max(0) as usize)
        }
    }
}

/// The picture of a scalar, RGB.
fn draw(tag: &str, points: &[(f64, f64)]) -> Drawn<Vec<u8>> {
    register_font(FONT, FontStyle::Normal, ttf_noto_sans::REGULAR).map_err(|_| "the font is damaged")?;
    let px = |n: u32| (n * OVERSAMPLING) as i32;
    let text = |size: u32| (FONT, px(size)).into_font().color(&TEXT);
    let (unit, factor) = quantity(tag, points.iter().map(|p| p.1).fold(0.0, f64::max));
    let points: Points = points.iter().map(|&(step, value)| (step, value * factor)).collect();
    let is_smoothed = tag.starts_with("train/") && !EXACT.contains(&tag) && points.len() >= SMOOTHED_FROM;
    let main = if is_smoothed { smooth(&points, SMOOTHING) } else { points.clone() };
    let x = Axis::of(points.iter().map(|p| p.0), 9.0, 1.0);
    // Of memory the amount tells something: its smallest changes would fill the picture.
    let from_zero = (tag == "train/memory_bytes").then_some(0.0);
    let y = Axis::of(points.iter().map(|p| p.1).chain(from_zero), 8.0, 0.0);

    let size = (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING);
    let mut canvas = vec![BACKGROUND; (size.0 * size.1 * 3) as usize];
    let root = BitMapBackend::with_buffer(&mut canvas, size).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin_top(px(MARGIN_TOP))
        .margin_right(px(MARGIN_RIGHT))
        .margin_bottom(px(12))
        .margin_left(px(12))
        .x_label_area_size(px(46))
        .y_label_area_size(px(76))
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID.stroke_width(px(1) as u32))
        .axis_style(TEXT.stroke_width(px(1) as u32))
        .set_all_tick_mark_size(px(4))
        .label_style(text(17))
        .axis_desc_style(text(18))
        .x_desc("step")
        .y_desc(unit)
        .draw()?;
    let line = |color: RGBColor| color.stroke_width(px(2) as u32);
    if is_smoothed {
        chart.draw_series(LineSeries::new(points.iter().copied(), line(RAW)))?;
    }
    chart.draw_series(LineSeries::new(main.iter().copied(), line(SMOOTHED)))?;
    if points.len() < SMOOTHED_FROM {
        chart.draw_series(main.iter().map(|&at| Circle::new(at, px(3), SMOOTHED.filled())))?;
    }
    let centered = text(21).pos(Pos::new(HPos::Center, VPos::Center));
    root.draw(&Text::new(tag, (px(WIDTH / 2), px(26)), centered))?;
    if is_smoothed {
        let smoothed = format!("smoothed by {SMOOTHING}");
        for (left, color, name) in [(560, RAW, "as logged"), (660, SMOOTHED, smoothed.as_str())] {
            let sample = [(px(left), px(26)), (px(left + 20), px(26))];
            root.draw(&PathElement::new(sample, line(color)))?;
            let beside = text(16).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(name, (px(left + 25), px(26)), beside))?;
        }
    }
    root.present()?;
    drop((chart, root));
    Ok(shrink(&canvas))
}

/// The mean of every `OVERSAMPLING`² pixels. Most are all of the background, which is seen without looking at each.
fn shrink(canvas: &[u8]) -> Vec<u8> {
    const N: usize = OVERSAMPLING as usize;
    const ROW: usize = WIDTH as usize * N * 3;
    let mut pixels = Vec::with_capacity((WIDTH * HEIGHT * 3) as usize);
    for rows in canvas.chunks_exact(ROW * N) {
        for column in (0..ROW).step_by(3 * N) {
            let square: [&[u8]; N] = array::from_fn(|i| &rows[i * ROW + column..][..3 * N]);
            if square.iter().all(|line| *line == [BACKGROUND; 3 * N]) {
                pixels.extend([BACKGROUND; 3]);
                continue;
            }
            for channel in 0..3 {
                let mut sum = 0;
                for line in square {
                    for i in 0..N {
                        sum += usize::from(line[3 * i + channel]);
                    }
                }
                pixels.push((sum / (N * N)) as u8);
            }
        }
    }
    pixels
}

fn encode(pixels: &[u8]) -> Drawn<Vec<u8>> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, WIDTH, HEIGHT);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_pixel_dims(Some(png::PixelDimensions {
        xppu: DOTS_PER_METER,
        yppu: DOTS_PER_METER,
        unit: png::Unit::Meter,
    }));
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct Picture {
        pixels: Vec<u8>,
    }

    impl Picture {
        fn read(path: &Path) -> Self {
            let file = std::io::BufReader::new(fs::File::open(path).unwrap());
            let mut reader = png::Decoder::new(file).read_info().unwrap();
            assert_eq!((reader.info().width, reader.info().height), (800, 500));
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            Self { pixels }
        }

        fn at(&self, x: usize, y: usize) -> RGBColor {
            let i = 3 * (y * WIDTH as usize + x);
            RGBColor(self.pixels[i], self.pixels[i + 1], self.pixels[i + 2])
        }

        fn count(&self, color: RGBColor) -> usize {
            let color = [color.0, color.1, color.2];
            self.pixels.chunks_exact(3).filter(|&pixel| pixel == color).count()
        }

        /// Left, top, right and bottom of the axes: the column and the row with the most dark pixels, and the margins.
        fn axes(&self) -> (usize, usize, usize, usize) {
            let is_dark = |x, y| self.at(x, y).0 < 0x80;
            let left = (0..800).max_by_key(|&x| (0..500).filter(|&y| is_dark(x, y)).count()).unwrap();
            let bottom = (0..500).max_by_key(|&y| (0..800).filter(|&x| is_dark(x, y)).count()).unwrap();
            (left, MARGIN_TOP as usize, (WIDTH - MARGIN_RIGHT) as usize, bottom)
        }

        /// Whether the colour is at this place between the axes, 0 to 1 from the lower left corner, give or take a pixel.
        fn has(&self, color: RGBColor, (x, y): (f64, f64)) -> bool {
            let (left, top, right, bottom) = self.axes();
            let x = left + (x * (right - left) as f64).round() as usize;
            let y = bottom - (y * (bottom - top) as f64).round() as usize;
            (x - 1..=x + 1).any(|x| (y - 1..=y + 1).any(|y| self.at(x, y) == color))
        }
    }

    fn pictures(log: &[Value]) -> (tempfile::TempDir, Vec<String>) {
        let run = tempfile::tempdir().unwrap();
        write(run.path(), log).unwrap();
        let files = fs::read_dir(run.path().join("images")).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        (run, names)
    }

    #[test]
    fn curves_are_where_their_values_are() {
        let mut log: Vec<Value> =
            (0..=40).map(|i| json!({"step": i, "epoch": 0.1, "loss": i / 4 % 2})).collect();
        log.extend((0..=10).map(|i| json!({"step": 4 * i, "learning_rate": 1e-5 * f64::from(i)})));
        log.extend([json!({"step": 0, "eval_loss": 2.0}), json!({"step": 40, "eval_loss": 1.0})]);
        let (run, names) = pictures(&log);
        assert_eq!(names, ["eval_loss.png", "train_learning_rate.png", "train_loss.png"]);
        let picture = |name: &str| Picture::read(&run.path().join("images").join(name));

        // The margins are a twentieth of the range on each side: 1/22 of the axis.
        let on_axis = |value: f64| (0.05 + value) / 1.1;
        let (falling, rising, both) =
            (picture("eval_loss.png"), picture("train_learning_rate.png"), picture("train_loss.png"));
        for x in [0.0, 0.2, 0.5, 0.7, 1.0] {
            assert!(rising.has(SMOOTHED, (on_axis(x), on_axis(x))), "rate at {x}");
            assert!(falling.has(SMOOTHED, (on_axis(x), on_axis(1.0 - x))), "evaluation at {x}");
        }
        assert!(!rising.has(SMOOTHED, (on_axis(0.2), on_axis(0.8))));
        assert!(rising.count(RAW) < 50 && both.count(RAW) > 500, "a schedule is not smoothed, a loss is");

        // Four points of 0, four of 1, and so on, as logged and smoothed: the fifth average is 1 / (1 + 0.9 + … + 0.9⁴).
        let x = |i: f64| on_axis(i / 40.0);
        assert!(both.has(RAW, (x(37.5), on_axis(1.0))) && both.has(RAW, (x(17.5), on_axis(0.0))));
        assert!(both.has(SMOOTHED, (x(4.0), on_axis(1.0 / 4.0951))));
        assert!(!both.has(SMOOTHED, (x(37.5), on_axis(1.0))));
    }

    #[test]
    fn a_short_series_is_drawn_as_logged() {
        let log: Vec<Value> = (1..SMOOTHED_FROM).map(|i| json!({"step": i, "loss": 40 - i})).collect();
        let (run, _) = pictures(&log);
        let picture = Picture::read(&run.path().join("images/train_loss.png"));
        let end = (1.05 / 1.1, 0.05 / 1.1);
        assert!(
            picture.has(SMOOTHED, end) && picture.count(RAW) < 50,
            "the last value is where it was logged"
        );
    }

    #[test]
    fn memory_is_drawn_from_zero_in_a_unit_of_its_size() {
        assert_eq!(quantity("train/memory_bytes", 45e6).0, "MiB");
        assert_eq!(quantity("train/memory_bytes", 8e9).0, "GiB");
        let log: Vec<Value> =
            (0..4).map(|i| json!({"step": i, "memory_bytes": 45_000_000 + 1000 * i})).collect();
        let (run, _) = pictures(&log);
        let picture = Picture::read(&run.path().join("images/train_memory_bytes.png"));
        assert!(picture.has(SMOOTHED, (0.5, 1.05 / 1.1)), "a line at the top, far from zero");
    }

    #[test]
    fn awkward_logs_are_drawn() {
        let log = [
            json!("no object"),
            json!({"loss": 1.0}),
            json!({"step": 1, "loss": null, "grad_norm": 0, "constant": -3.5, "wide": 3e38, "tiny": 1e-320, "huge": 1e300}),
            json!({"step": 2, "loss": null, "grad_norm": 0.0, "constant": -3.5, "wide": -3e38, "tiny": 5e-324}),
            json!({"step": 4_000_000_000u64, "eval_loss": 1.0, "constant": -3.5}),
        ];
        let (run, names) = pictures(&log);
        let names_of_finite = ["eval_loss", "train_constant", "train_grad_norm", "train_tiny", "train_wide"];
        assert_eq!(names, names_of_finite.map(|name| format!("{name}.png")));
        for name in names {
            let picture = Picture::read(&run.path().join("images").join(&name));
            assert!(picture.count(SMOOTHED) > 5, "{name} is blank");
        }
        assert!(pictures(&[]).1.is_empty());
    }

    #[test]
    fn smoothing_starts_at_the_first_value() {
        let smoothed = smooth(&[(1.0, 4.0), (2.0, 1.0), (3.0, 1.0)], 0.5);
        assert_eq!(smoothed, [(1.0, 4.0), (2.0, 2.0), (3.0, 2.5 / 1.75)]);
        assert!(smooth(&[(0.0, 7.0); 50], SMOOTHING).iter().all(|p| (p.1 - 7.0).abs() < 1e-12));
    }

    #[test]
    fn labels_have_the_digits_that_tell_them_apart() {
        let labels = |values: &[f64], min_tick| {
            let axis = Axis::of(values.iter().copied(), 5.0, min_tick);
            let points = axis.key_points(plotters::coord::ranged1d::BoldPoints(9));
            points.iter().map(|value| axis.format_ext(value)).collect::<Vec<_>>()
        };
        assert_eq!(labels(&[0.0, 1.0], 0.0), ["0", "0.5", "1.0"]);
        assert_eq!(labels(&[0.0, 1e-4], 0.0), ["0", "5e-5", "1.0e-4"]);
        assert_eq!(labels(&[1.0, 3.0], 1.0), ["1", "2", "3"]);
        assert_eq!(labels(&[-1.25, -1.2], 0.0), ["-1.24", "-1.22", "-1.20"]);
        assert_eq!(labels(&[2e6, 4e6], 0.0), ["2.0e6", "2.5e6", "3.0e6", "3.5e6", "4.0e6"]);
    }
}
