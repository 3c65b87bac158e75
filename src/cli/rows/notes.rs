//! What is odd about the rows of a run, said on standard error before it begins.

use std::collections::HashSet;

use super::is_demo_set;
use crate::config::TrainArgs;
use crate::data::dataset::Row;
use crate::data::source::{self, Folder};
use crate::data::spelling::meant;
use crate::words::{counted, first_of, thousands};

/// What begins messages and ends answers in chat formats, Llama-3's and ChatML.
const CONTROL: [&str; 4] = ["<|start_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"];

/// How many of a folder's files it names.
const SHOWN_FILES: usize = 10;

/// Columns that rows can do without, so that nothing else tells of a name that is nearly theirs.
const OPTIONAL: [&str; 2] = ["system", "history"];

/// Says on standard error what is odd about the rows of some data sets, the first of which has these columns.
pub(super) fn tell(args: &TrainArgs, specs: &[String], rows: &[Row], columns: &[String]) {
    let notes = [misspelt(args, columns), formatted(rows), unasked(rows), repeated(rows)];
    folders(specs).into_iter().chain(notes.into_iter().flatten()).for_each(|note| note!("{note}"));
}

/// Says that a column is not read whose name is nearly that of one that would be.
fn misspelt(args: &TrainArgs, columns: &[String]) -> Option<String> {
    let renames = args.columns.iter().flatten();
    let is_renamed = |column: &&str| renames.clone().any(|(theirs, _)| theirs == column);
    let has =
        |ours: &str| columns.iter().chain(renames.clone().map(|(_, given)| given)).any(|name| name == ours);
    let unread = || columns.iter().map(String::as_str).filter(|column| !is_renamed(column));
    let missing = OPTIONAL.into_iter().filter(|ours| !has(ours));
    let (ours, theirs) = missing.filter_map(|ours| Some((ours, meant(ours, unread())?))).next()?;
    Some(format!(
        "note: the column `{theirs}` is not read; as `{ours}`, which --columns can rename it to, it would be"
    ))
}

/// Says that rows' texts are in a chat format already: what is written there as text is not read as its control tokens.
fn formatted(rows: &[Row]) -> Option<String> {
    let control = |text: &str| CONTROL.into_iter().find(|token| text.contains(token));
    let control = |row: &Row| {
        let of_history = row.history.iter().flat_map(|(question, answer)| [question, answer]);
        let texts = [&row.query, &row.response, &row.rejected_response].into_iter().chain(&row.system);
        texts.chain(of_history).find_map(|text| control(text))
    };
    let found: Vec<_> = rows.iter().filter_map(|row| Some((row, control(row)?))).collect();
    let &(Row { location, .. }, token) = found.first()?;
    Some(format!(
        "note: `{token}` or the like stands as text in {}, the first at {location}: rows are put into the model's chat format here, \
         and had better come without one",
        counted(found.len(), "row")
    ))
}

/// Says that the user asks nothing in some rows, which a column of another name may be the reason of.
fn unasked(rows: &[Row]) -> Option<String> {
    let is_empty = |row: &&Row| row.query.trim().is_empty();
    let first = rows.iter().find(is_empty)?;
    Some(format!(
        "note: the query is empty in {}, the first at {}",
        counted(rows.iter().filter(is_empty).count(), "row"),
        first.location
    ))
}

/// Says that the run's system prompt is used nowhere, where every row has its own.
pub(super) fn unused_system<'a>(args: &TrainArgs, mut rows: impl Iterator<Item = &'a Row>) -> Option<String> {
    let is_unused = args.system.is_some() && rows.all(|row| row.system.is_some());
    is_unused.then(|| "note: --system goes before no row, as each has a system prompt of its own".to_owned())
}

/// Says which files of the folders among these data sets are read, where these are several or there are folders beside them.
fn folders(specs: &[String]) -> Vec<String> {
    if is_demo_set(specs) {
        return Vec::new();
    }
    let told = |spec: &String| {
        let Folder { path, files, has_folders } = source::folder(spec)?;
        let names = files.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()));
        let names: Vec<_> = names.collect();
        let inner = if has_folders { ", and nothing of the folders in it" } else { "" };
        (names.len() > 1 || has_folders).then(|| {
            format!(
                "note: of {} these are read: {}{inner}",
                path.display(),
                first_of(&names, SHOWN_FILES).join(", ")
            )
        })
    };
    specs.iter().filter_map(told).collect()
}

/// Says that rows to evaluate on are learned from as well, wherever either stands.
pub(super) fn learned_from(train: &[Row], val: &[Row]) -> Option<String> {
    let learned: HashSet<_> = train.iter().map(Row::content).collect();
    let n_both = val.iter().filter(|row| learned.contains(&row.content())).count();
    (n_both > 0).then(|| {
        let are = if n_both == 1 { "is" } else { "are" };
        format!(
            "note: of {} to evaluate on {} {are} trained on as well",
            counted(val.len(), "row"),
            thousands(n_both)
        )
    })
}

/// Says that rows are taken more than once: a sample has more than its data set, or two data sets have a file in common.
fn repeated(rows: &[Row]) -> Option<String> {
    let places: HashSet<_> = rows.iter().map(|row| &row.location).collect();
    (places.len() < rows.len()).then(|| {
        format!(
            "note: the {} are {} different ones: a data set has fewer than `#` asks for, or is named twice",
            counted(rows.len(), "row"),
            thousands(places.len())
        )
    })
}

/// Says that a share of so many rows is less than one, unless none was asked for.
pub(super) fn none_held_out(test_ratio: f64, n_rows: usize) -> Option<String> {
    // In hundredths, the least share that holds a row out.
    let enough = match n_rows {
        0 | 1 => String::new(),
        n => format!("--dataset_test_ratio {} or ", 100usize.div_ceil(n) as f64 / 100.0),
    };
    (test_ratio > 0.0).then(|| {
        format!(
            "note: nothing is evaluated, as a share of {test_ratio} of {} is no whole row; {enough}--val_dataset FILE has it done",
            counted(n_rows, "row")
        )
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::dataset::Location;

    fn row(line: usize, query: &str, response: &str) -> Row {
        Row {
            query: query.to_owned(),
            response: response.to_owned(),
            rejected_response: "r".to_owned(),
            system: None,
            history: Vec::new(),
            location: Location::new(Path::new("pairs.jsonl"), line),
        }
    }

    #[test]
    fn rows_in_a_chat_format_already_are_told_of() {
        let plain = row(1, "What does <|eot|> do?", "c");
        assert_eq!(formatted(std::slice::from_ref(&plain)), None);
        let note = formatted(&[plain, row(2, "q", "c<|eot_id|>"), row(3, "<|im_start|>user", "c")]).unwrap();
        assert!(
            note.starts_with(
                "note: `<|eot_id|>` or the like stands as text in 2 rows, the first at pairs.jsonl:2:"
            ),
            "{note}"
        );
    }

    #[test]
    fn a_column_that_is_nearly_ours_is_told_of() {
        let note = |columns: &[&str], renames: &[(&str, &str)]| {
            let renames = renames.iter().map(|(theirs, ours)| ((*theirs).to_owned(), (*ours).to_owned()));
            let args = TrainArgs { columns: Some(renames.collect()), ..TrainArgs::default() };
            misspelt(&args, &columns.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        let says = note(&["query", "sytem"], &[("q", "query")]).unwrap();
        assert!(says.starts_with("note: the column `sytem` is not read; as `system`"), "{says}");
        assert!(note(&["system", "histry"], &[]).unwrap().contains("`histry`"));
        assert_eq!(note(&["query", "system", "systems", "source"], &[]), None);
        for renames in [("sytem", "system"), ("sytem", ""), ("persona", "system")] {
            assert_eq!(note(&["query", "sytem", "persona"], &[renames]), None);
        }
    }

    #[test]
    fn rows_without_a_query_and_rows_that_are_repeated_are_told_of() {
        let rows = [row(1, "q", "c"), row(2, " \n", "c"), row(3, "", "c")];
        assert_eq!(unasked(&rows[..1]), None);
        let note = unasked(&rows).unwrap();
        assert_eq!(note, "note: the query is empty in 2 rows, the first at pairs.jsonl:2");
        assert_eq!(repeated(&rows), None, "rows of other lines");
        let note = repeated(&[row(1, "q", "c"), row(2, "q", "c"), row(1, "q", "c")]).unwrap();
        assert!(note.starts_with("note: the 3 rows are 2 different ones"), "{note}");
    }

    #[test]
    fn what_is_evaluated_and_trained_on_is_told_of() {
        let (train, other) = ([row(1, "q", "c"), row(2, "q", "d")], row(7, "q", "e"));
        assert_eq!(learned_from(&train, std::slice::from_ref(&other)), None);
        let note = learned_from(&train, &[other, row(8, "q", "d")]).unwrap();
        assert_eq!(note, "note: of 2 rows to evaluate on 1 is trained on as well");
    }

    #[test]
    fn a_system_prompt_that_goes_before_no_row_is_told_of() {
        let args = TrainArgs { system: Some("s".to_owned()), ..TrainArgs::default() };
        let own = Row { system: Some("t".to_owned()), ..row(1, "q", "c") };
        assert_eq!(unused_system(&args, [&own, &row(2, "q", "c")].into_iter()), None);
        assert_eq!(unused_system(&TrainArgs::default(), std::iter::once(&own)), None);
        assert!(unused_system(&args, std::iter::once(&own)).is_some());
    }

    #[test]
    fn the_files_of_a_folder_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let spec = folder.path().display().to_string();
        let says = || folders(std::slice::from_ref(&spec)).concat();
        std::fs::write(folder.path().join("b.jsonl"), "").unwrap();
        assert_eq!(says(), "", "of one file there is nothing to tell");
        for i in 0..SHOWN_FILES {
            std::fs::write(folder.path().join(format!("a{i}.jsonl")), "").unwrap();
        }
        assert!(
            says().contains("are read: a0.jsonl, a1.jsonl, ") && says().ends_with("a9.jsonl, and 1 more"),
            "{}",
            says()
        );
        std::fs::create_dir(folder.path().join("more")).unwrap();
        assert!(says().ends_with("and 1 more, and nothing of the folders in it"), "{}", says());
        assert_eq!(folders(&["demo".to_owned()]), [""; 0], "the demo's rows are of no folder");
    }

    #[test]
    fn rows_too_few_to_hold_one_out_are_told_of() {
        assert_eq!(none_held_out(0.0, 7), None, "as asked");
        let says = |n_rows| none_held_out(0.01, n_rows).unwrap();
        let seven = "note: nothing is evaluated, as a share of 0.01 of 7 rows is no whole row; --dataset_test_ratio 0.15 or \
                     --val_dataset FILE has it done";
        assert_eq!(says(7), seven);
        assert!(says(1).ends_with("of 1 row is no whole row; --val_dataset FILE has it done"), "{}", says(1));
        for n_rows in 2..100 {
            let ratio = says(n_rows)
                .split("--dataset_test_ratio ")
                .nth(1)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .to_owned();
            let n_val = (n_rows as f64 * ratio.parse::<f64>().unwrap() + 1e-9).floor();
            assert!(n_val >= 1.0, "{ratio} of {n_rows}");
        }
    }
}
