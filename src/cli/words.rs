//! Figures and lines as a terminal shows them.

use std::io::{self, IsTerminal};

use comfy_table::Table;

/// Columns of a terminal that nobody made wider.
const WIDTH: usize = 80;
/// Columns of a line's label.
const LABEL: usize = 9;

/// Seconds in words: `3 h 20 min`.
pub fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0..2 => format!("{seconds:.0} s"),
        2..120 => format!("{minutes} min"),
        120..2880 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

/// `8.03 billion`, `1.1 million`
pub fn millions(number: usize) -> String {
    let number = number as f64;
    if number < 1e9 { format!("{:.1} million", number / 1e6) } else { format!("{:.2} billion", number / 1e9) }
}

/// A label and its text, cut between words for a terminal, with the text's lines below each other. A word that is longer than a line
/// stays whole.
pub fn entry(label: &str, text: &str) -> String {
    wrapped(format!("{label:LABEL$}"), text)
}

/// The same for standard error, whose lines stay whole where no terminal shows them: a log is searched line by line.
pub fn noted(label: &str, text: &str) -> String {
    if io::stderr().is_terminal() { entry(label, text) } else { format!("{label:LABEL$}{text}") }
}

/// A text for standard output, cut between words where a terminal shows it.
pub fn paragraph(text: &str) -> String {
    if io::stdout().is_terminal() { wrapped(String::new(), text) } else { text.to_owned() }
}

/// A table as wide as the terminal, where that has a width.
pub fn new_table() -> Table {
    let mut table = Table::new();
    if table.width() == Some(0) {
        table.set_width(WIDTH as u16);
    }
    table
}

fn wrapped(label: String, text: &str) -> String {
    let indent = label.len();
    let (mut lines, mut line) = (Vec::new(), label);
    for (i, word) in text.split(' ').enumerate() {
        let is_first = i == 0 || line.len() == indent;
        if !is_first && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
        } else if !is_first {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        let counts = [1_058_112, 8_030_261_248].map(millions);
        assert_eq!(counts, ["1.1 million", "8.03 billion"]);
        let shown = [4.2, 80.0, 3600.0, 12_000.0, 1e6].map(duration);
        assert_eq!(shown, ["4 s", "80 s", "60 min", "3 h 20 min", "11.6 days"]);
    }

    #[test]
    fn long_lines_are_cut_between_words() {
        assert_eq!(entry("data", "429 pairs"), "data     429 pairs");
        let text = format!("{} of it and a path{}", "word ".repeat(14).trim_end(), "/long".repeat(20));
        let lines: Vec<_> = entry("device", &text).lines().map(str::to_owned).collect();
        assert_eq!(lines[0], format!("device   {}", "word ".repeat(14).trim_end()));
        assert_eq!(lines[1], "         of it and a");
        assert_eq!(lines[2], format!("         path{}", "/long".repeat(20)));
        assert_eq!(lines.len(), 3);
        assert_eq!(
            wrapped(String::new(), &"word ".repeat(20)),
            format!("{}\n{}", "word ".repeat(16).trim_end(), "word ".repeat(4))
        );
    }
}
