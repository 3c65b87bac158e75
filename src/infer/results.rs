//! The file that answers to a file of prompts go to.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::data::dataset::Location;
use crate::data::prompts::Prompt;
use crate::error::{Error, Result};
use crate::lock::Lock;

/// A result file, which is this run's alone: a JSON object a line, the row's columns (or `query`) and `response`. A response that the row
/// already had is kept as `labels`, as ms-swift does.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    file: Out,
}

/// Where lines go; only files are locked, as devices are many runs'.
#[derive(Debug)]
enum Out {
    Own(Lock),
    Shared(File),
}

impl Results {
    /// Begins a file.
    ///
    /// # Errors
    /// [`Error::File`] if there is one that holds something, as that of the prompts does, or that is another run's; [`Error::Io`] if it
    /// cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let results = Self::open(path)?;
        match results.is_file() && path.metadata().is_ok_and(|data| data.len() > 0) {
            true => Err(Error::file(path, "is there already")
                .with_hint("--append adds to what an interrupted run left; else name another --result_file")),
            false => Ok(results),
        }
    }

    /// Goes on with the file of a run that ended early, and gives with it those of the prompts that it has no answer to. A last line that
    /// was cut off goes.
    ///
    /// # Errors
    /// [`Error::Row`] of its first line that is no answer to any prompt, so that nothing else is written into; as [`Self::create`].
    pub fn go_on(path: &Path, prompts: Vec<Result<Prompt>>) -> Result<(Self, Vec<Result<Prompt>>)> {
        let results = Self::open(path)?;
        if !results.is_file() {
            return Ok((results, prompts));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let n_whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let (whole, tail) = bytes.split_at(n_whole);
        let mut unanswered = Unanswered { prompts: prompts.into_iter().map(Some).collect(), next: 0 };
        let mut n_lines = 0;
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            n_lines += 1;
            unanswered.take(&line[..line.len() - 1]).ok_or_else(|| no_answer(path, n_lines))?;
        }
        if !tail.is_empty() && unanswered.take(tail).is_some() {
            results.write(b"\n")?;
        } else if !tail.is_empty() {
            // Of an answer it would be the beginning; what is anything else stays.
            let is_cut = tail[0] == b'{' && serde_json::from_slice::<Value>(tail).is_err() && n_lines > 0;
            if !is_cut {
                return Err(no_answer(path, n_lines + 1));
            }
            // By a handle of its own: Windows shortens none that may only append.
            let cut = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(n_whole as u64));
            cut.map_err(Error::io("write", path))?;
        }
        Ok((results, unanswered.prompts.into_iter().flatten().collect()))
    }

    fn open(path: &Path) -> Result<Self> {
        let opened =
            OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("write", path))?;
        let is_file = opened.metadata().is_ok_and(|data| data.is_file());
        let file = if is_file { Out::Own(Lock::of(opened, path)?) } else { Out::Shared(opened) };
        Ok(Self { path: path.to_owned(), file })
    }

    fn is_file(&self) -> bool {
        matches!(self.file, Out::Own(_))
    }

    fn file(&self) -> &File {
        match &self.file {
            Out::Own(lock) => lock.file(),
            Out::Shared(file) => file,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds an answer.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn add(&mut self, prompt: &Prompt, response: &str) -> Result<()> {
        // In one piece, so that a program that is ended leaves whole lines.
        self.write(format!("{}\n", row(prompt, response)).as_bytes())
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        self.file().write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

/// Prompts that are crossed out as answers to them are found.
struct Unanswered {
    prompts: Vec<Option<Result<Prompt>>>,
    /// Behind the last that was found, where the next is likeliest.
    next: usize,
}

impl Unanswered {
    /// Crosses out the prompt that a line answers.
    fn take(&mut self, line: &[u8]) -> Option<()> {
        let line = std::str::from_utf8(line).ok()?;
        let written: Value = serde_json::from_str(line).ok()?;
        let response = written["response"].as_str()?;
        let is_its = |prompt: &Option<Result<Prompt>>| match prompt {
            Some(Ok(prompt)) => {
                let written = row(prompt, response).to_string();
                written == line
            }
            _ => false,
        };
        let n = self.prompts.len();
        let found = (0..n).map(|i| (self.next + i) % n).find(|i| is_its(&self.prompts[*i]))?;
        self.prompts[found] = None;
        self.next = found + 1;
        Some(())
    }
}

fn no_answer(path: &Path, line: usize) -> Error {
    let hint = "--append goes on with answers to the same prompts; for others name another --result_file";
    Location::new(path, line).error("is no answer to any of the prompts, or a second one").with_hint(hint)
}

fn row(prompt: &Prompt, response: &str) -> Value {
    let mut row = prompt.columns.clone();
    if row.is_empty() {
        row.insert("query".to_owned(), Value::from(prompt.query.as_str()));
    }
    if let Some(labels) = row.insert("response".to_owned(), Value::from(response)) {
        row.insert("labels".to_owned(), labels);
    }
    Value::Object(row)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::prompts::read_prompts;

    fn read(name: &str, text: &str) -> Vec<Result<Prompt>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        read_prompts(&path).unwrap()
    }

    #[test]
    fn a_result_keeps_the_row_and_its_own_response() {
        let result = |name, text, response| row(&read(name, text).remove(0).unwrap(), response);
        let rows = "{\"query\": \"a\", \"response\": \"old\", \"id\": 7}\n";
        let expected = serde_json::json!({ "query": "a", "response": "new", "id": 7, "labels": "old" });
        assert_eq!(result("prompts.jsonl", rows, "new"), expected);
        assert_eq!(result("prompts.txt", "b", "c"), serde_json::json!({ "query": "b", "response": "c" }));
    }

    #[test]
    fn a_file_that_holds_something_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        for _ in 0..2 {
            drop(Results::create(&path).unwrap());
        }
        #[cfg(unix)]
        {
            let _first = Results::create(&path).unwrap();
            assert!(
                Results::create(&path).unwrap_err().to_string().contains("another run"),
                "both were empty"
            );
        }
        fs::write(&path, "{}").unwrap();
        let error = Results::create(&path).unwrap_err();
        assert!(error.to_string().contains("answers.jsonl: is there already"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
    }

    #[test]
    fn what_has_answers_is_gone_on_with_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        let text = r#"{"query": "a", "p": 0.1} {} {"query": "b"} {"query": "c"} {"query": "b"}"#;
        let prompts = || read("rows.jsonl", &text.replace("} {", "}\n{"));
        let line = |i: usize, response: &str| format!("{}\n", row(prompts()[i].as_ref().unwrap(), response));
        let go_on = || Results::go_on(&path, prompts());
        let queries = |rest: Vec<Result<Prompt>>| {
            let query =
                |prompt: Result<Prompt>| prompt.map_or_else(|_| "-".to_owned(), |prompt| prompt.query);
            rest.into_iter().map(query).collect::<String>()
        };
        assert_eq!(queries(go_on().unwrap().1), "a-bcb", "there is no file");
        let whole = line(0, "1") + &line(2, "2\n狗");
        for (text, kept, left) in [
            (whole.clone(), whole.clone(), "-cb"),
            // One that was answered late, as the run before had been interrupted too.
            (line(3, "3") + &line(0, "1"), line(3, "3") + &line(0, "1"), "-bb"),
            (line(2, "2") + &line(4, "2"), line(2, "2") + &line(4, "2"), "a-c"),
            (whole.trim_end().to_owned(), whole.clone(), "-cb"),
            (whole.clone() + "{\"query\": \"c\", \"resp", whole.clone(), "-cb"),
            (
                line(0, "") + &line(2, "") + &line(3, "") + &line(4, ""),
                line(0, "") + &line(2, "") + &line(3, "") + &line(4, ""),
                "-",
            ),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(queries(go_on().unwrap().1), left, "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), kept);
        }
        // Cut within a character.
        fs::write(&path, [whole.as_bytes(), b"{\"query\": \"\xe7\x8b"].concat()).unwrap();
        assert_eq!(queries(go_on().unwrap().1), "-cb");
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        for (text, at) in [
            (line(0, "1") + &line(0, "1"), 2),
            (line(0, "1") + "my notes", 2),
            ("my notes\n".to_owned(), 1),
            ("{\"my".to_owned(), 1),
            (line(0, "1") + "\n" + &line(2, "2"), 2),
        ] {
            fs::write(&path, &text).unwrap();
            let error = go_on().unwrap_err().to_string();
            assert!(error.contains(&format!("answers.jsonl:{at}: is no answer")), "{text}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
