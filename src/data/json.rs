//! The JSON values of a text, each with its place.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Deserializer, Value};

use super::dataset::Location;
use crate::error::{Error, Result};

/// Reads a text file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Row`] naming the first line that is not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        Location::new(path, line).error("not UTF-8").with_hint("save the file as UTF-8")
    })
}

/// Calls `each` with every JSON value of a text and the place at which it begins.
///
/// The text is either one array, whose elements are the values, or one value a line. Empty lines and a byte order mark
/// are ignored.
///
/// # Errors
/// [`Error::Row`] at the first place that is not JSON; what `each` returns.
pub(super) fn each_value(
    text: &str,
    path: &Path,
    mut each: impl FnMut(Location, Value) -> Result<()>,
) -> Result<()> {
    let text = without_mark(text);
    if is_array(text) {
        return each_element(text, path, each);
    }
    let path: Arc<Path> = path.into();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str(line)
            .map_err(|error| not_json(&path, i + 1, &reason(&error), error.column()))?;
        each(Location::new(path.clone(), i + 1), value)?;
    }
    Ok(())
}

/// Whether a text is one array, and not one value a line.
pub(super) fn is_array(text: &str) -> bool {
    without_mark(text).trim_start().starts_with('[')
}

/// A text without a byte order mark.
pub(super) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// The elements of an array, each parsed on its own so that its place is known.
fn each_element(text: &str, path: &Path, mut each: impl FnMut(Location, Value) -> Result<()>) -> Result<()> {
    let (file, mut last_line): (Arc<Path>, _) = (path.into(), 0);
    let mut cursor = Cursor { text, offset: 0, line: 1 };
    let broken = |at: &Cursor, problem: &str| Err(not_json(path, at.line, problem, at.column()));
    cursor.skip_to_token();
    cursor.skip(1);
    cursor.skip_to_token();
    let mut is_first = true;
    while !cursor.rest().starts_with(']') {
        if !is_first {
            if !cursor.rest().starts_with(',') {
                return broken(&cursor, "expected `,` or `]` after an element of the array");
            }
            cursor.skip(1);
            cursor.skip_to_token();
        }
        is_first = false;
        let mut values = Deserializer::from_str(cursor.rest()).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => {
                let column = (cursor.line == last_line).then(|| cursor.column());
                last_line = cursor.line;
                each(Location { path: file.clone(), line: cursor.line, column }, value)?;
            }
            Some(Err(error)) => {
                // serde_json counts from where it began to read, and a column of 0 is the line's end before.
                let (line, column) = match error.line() {
                    0 | 1 => (cursor.line, cursor.column() + error.column().saturating_sub(1)),
                    lines => (cursor.line + lines - 1, error.column()),
                };
                return Err(not_json(path, line, &reason(&error), column));
            }
            None => return broken(&cursor, "the array does not end"),
        }
        cursor.skip(values.byte_offset());
        cursor.skip_to_token();
    }
    cursor.skip(1);
    cursor.skip_to_token();
    if cursor.rest().is_empty() { Ok(()) } else { broken(&cursor, "something follows the array") }
}

/// A place in a text.
struct Cursor<'t> {
    text: &'t str,
    offset: usize,
    line: usize,
}

impl<'t> Cursor<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.offset..]
    }

    fn skip(&mut self, n_bytes: usize) {
        self.line += self.rest()[..n_bytes].matches('\n').count();
        self.offset += n_bytes;
    }

    fn skip_to_token(&mut self) {
        let rest = self.rest();
        self.skip(rest.len() - rest.trim_start().len());
    }

    /// 1-based, in bytes, as `serde_json` counts.
    fn column(&self) -> usize {
        1 + self.offset - self.text[..self.offset].rfind('\n').map_or(0, |newline| newline + 1)
    }
}

/// `serde_json`'s reason without its place.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason).to_owned()
}

fn not_json(path: &Path, line: usize, reason: &str, column: usize) -> Error {
    Location::new(path, line)
        .error(format!("not JSON: {reason} (column {column})"))
        .with_hint("a .jsonl file has one JSON object a line, a .json file one array of objects")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn values(text: &str) -> Result<Vec<(String, Value)>> {
        let mut values = Vec::new();
        each_value(text, Path::new("rows"), |location, value| {
            values.push((location.to_string().split_off("rows:".len()), value));
            Ok(())
        })?;
        Ok(values)
    }

    #[test]
    fn lines_and_arrays_give_values_with_their_places() {
        let at = |place: &str, value| (place.to_owned(), value);
        let two = |first, second| vec![at(first, json!({"a": 1})), at(second, json!({"b": "]\n"}))];
        for (text, expected) in [
            ("{\"a\": 1}\n{\"b\": \"]\\n\"}", two("1", "2")),
            ("\u{feff}{\"a\": 1}\r\n\r\n  \n{\"b\": \"]\\n\"}\r\n", two("1", "4")),
            ("[{\"a\": 1}, {\"b\": \"]\\n\"}]", two("1", "1:12")),
            ("\u{feff}\n[\n  {\n    \"a\": 1\n  },\n  {\"b\": \"]\\n\"}\n]\n", two("3", "6")),
            ("", vec![]),
            (" \n\n", vec![]),
            ("[]", vec![]),
            ("[\n]\n", vec![]),
            ("1\n\"x\"", vec![at("1", json!(1)), at("2", json!("x"))]),
            ("[1, \"x\"]", vec![at("1", json!(1)), at("1:5", json!("x"))]),
            (
                "[1,\n2, 3,\n4]",
                vec![at("1", json!(1)), at("2", json!(2)), at("2:4", json!(3)), at("3", json!(4))],
            ),
        ] {
            assert_eq!(values(text).unwrap(), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_not_json_is_named_by_line_and_column() {
        for (text, expected) in [
            ("{\"a\": 1}\n\n{\"a\": }", "rows:3: not JSON: expected value (column 7)"),
            ("{\"a\": 1} {}", "rows:1: not JSON: trailing characters (column 10)"),
            ("{\n  \"a\": 1\n}", "rows:1: not JSON: EOF while parsing an object (column 1)"),
            ("[{\"a\": 1},\n {\"a\": }]", "rows:2: not JSON: expected value (column 8)"),
            ("[{\"a\": 1},\n {\n\"a\": }]", "rows:3: not JSON: expected value (column 6)"),
            ("[{}\n{}]", "rows:2: not JSON: expected `,` or `]` after an element of the array (column 1)"),
            ("[{},\n", "rows:2: not JSON: the array does not end (column 1)"),
            ("[{}", "rows:1: not JSON: expected `,` or `]` after an element of the array (column 4)"),
            ("[{},]", "rows:1: not JSON: expected value (column 5)"),
            ("[{}]\n{}", "rows:2: not JSON: something follows the array (column 1)"),
        ] {
            let error = values(text).unwrap_err();
            assert_eq!(error.to_string(), expected, "{text:?}");
            assert!(error.hint().is_some(), "{text:?}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_named_by_their_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("gbk.jsonl");
        std::fs::write(&file, b"{}\n{\"\xe4\xb8\xad\": 1}\n{\"\xd6\xd0\": 1}\n").unwrap();
        let error = read_text(&file).unwrap_err();
        assert_eq!(error.to_string(), format!("{}:3: not UTF-8", file.display()));
        assert_eq!(error.hint(), Some("save the file as UTF-8"));
    }
}
