//! What a data set may be named, and the files that it then is.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The columns of a row in one of the text forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// What the user says.
    pub query: &'static str,
    /// The chosen answer.
    pub response: &'static str,
    /// The rejected answer.
    pub rejected_response: &'static str,
}

/// A data set that is known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// What `--dataset` calls it.
    pub name: &'static str,
    /// Its id on ModelScope.
    pub modelscope_id: &'static str,
    /// Its id on Hugging Face.
    pub huggingface_id: &'static str,
    /// Which of its columns is what.
    pub columns: Columns,
}

pub(super) const SHAREAI: Columns =
    Columns { query: "question", response: "answer_zh", rejected_response: "answer_en" };

/// The data sets that are known by name, with ms-swift's names and columns.
pub const REGISTRY: &[Known] = &[Known {
    name: "shareai-llama3-dpo-zh-en-emoji",
    modelscope_id: "hjh0119/shareAI-Llama3-DPO-zh-en-emoji",
    huggingface_id: "shareAI/DPO-zh-en-emoji",
    columns: SHAREAI,
}];

/// Files that `datasets` writes beside the data.
const NOT_DATA: [&str; 3] = ["dataset_info.json", "dataset_infos.json", "state.json"];

/// A data set found on disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// The file or folder.
    pub(super) path: PathBuf,
    /// Its data files; those of a folder sorted by name.
    pub(super) files: Vec<PathBuf>,
    /// How many rows to take, where the spec says so.
    pub(super) sample: Option<usize>,
}

/// Finds every spec on disk, names of the registry in the folder `base`.
///
/// # Errors
/// [`Error::Config`] with every spec that names nothing; [`Error::Io`] for a folder that cannot be read.
pub(super) fn resolve(specs: &[String], base: &Path) -> Result<Vec<Source>> {
    if specs.is_empty() {
        return Err(Error::config("no data set is given"));
    }
    let (mut sources, mut problems, mut hint) = (Vec::new(), Vec::new(), None);
    for spec in specs {
        match resolve_one(spec, base)? {
            Ok(source) => sources.push(source),
            Err(missing) => {
                problems.push(format!("data set `{spec}`: {}", missing.problem));
                hint.get_or_insert(missing.hint);
            }
        }
    }
    if problems.is_empty() { Ok(sources) } else { Err(Error::Config { problems, hint }) }
}

/// Why a spec names nothing, and what to do.
struct Missing {
    problem: String,
    hint: String,
}

fn resolve_one(spec: &str, base: &Path) -> Result<std::result::Result<Source, Missing>> {
    let missing = |problem: String, hint: String| Ok(Err(Missing { problem, hint }));
    let (name, sample) = match spec.rsplit_once('#') {
        Some((name, n)) if !base.join(spec).exists() => match n.parse() {
            Ok(n) if n > 0 => (name, Some(n)),
            _ => {
                let problem = format!("`#{n}` is not a number of rows");
                return missing(problem, format!("`{name}#500` takes 500 rows"));
            }
        },
        _ => (spec, None),
    };
    let Some(path) = find(name, base) else {
        let (problem, hint) = not_found(name, base);
        return missing(problem, hint);
    };
    let files = if path.is_dir() { files_in(&path)? } else { vec![path.clone()] };
    if files.is_empty() {
        let problem = "the folder holds no .jsonl and no .json file".to_owned();
        return missing(problem, CONVERT.to_owned());
    }
    if let Some(other) = files.iter().find_map(|file| other_format(file)) {
        return missing(format!("`.{other}` files are not read, only .jsonl and .json"), CONVERT.to_owned());
    }
    Ok(Ok(Source { path, files, sample }))
}

const CONVERT: &str = "in Python, datasets.load_dataset(…)[\"train\"].to_json(\"data.jsonl\") writes any data set as JSON \
                       lines (force_ascii=False keeps it readable)";

fn find(name: &str, base: &Path) -> Option<PathBuf> {
    let literal = base.join(name);
    if !name.is_empty() && literal.exists() {
        return Some(literal);
    }
    // What a download of either hub is usually called.
    let known = known(name)?;
    let folder = |id: &'static str| id.rsplit('/').next().unwrap_or(id).to_owned();
    [
        known.name.to_owned(),
        format!("{}.jsonl", known.name),
        format!("{}.json", known.name),
        folder(known.modelscope_id),
        folder(known.huggingface_id),
    ]
    .into_iter()
    .map(|name| base.join(name))
    .find(|path| path.exists())
}

fn known(name: &str) -> Option<&'static Known> {
    REGISTRY.iter().find(|known| [known.name, known.modelscope_id, known.huggingface_id].contains(&name))
}

fn not_found(name: &str, base: &Path) -> (String, String) {
    if let Some(known) = known(name) {
        return (
            format!(
                "this build does not download, and there is no {0}, {0}.jsonl or {0}.json in the current folder",
                known.name
            ),
            format!(
                "download {} from ModelScope or {} from Hugging Face, and pass its folder or .jsonl file instead of the \
                 name",
                known.modelscope_id, known.huggingface_id
            ),
        );
    }
    let path = base.join(name);
    let folder = path.parent().unwrap_or(base);
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let neighbours = here.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let nearby: Vec<String> = neighbours
        .filter_map(|file| Some(Path::new(name).with_file_name(file.file_name()?).to_string_lossy().into_owned()))
        .chain(REGISTRY.iter().map(|known| known.name.to_owned()))
        .collect();
    let closest = nearby.iter().map(|other| (edits(name, other), other)).min();
    let names: Vec<_> = REGISTRY.iter().map(|known| known.name).collect();
    let hint = match closest {
        Some((distance, other)) if distance <= 2.max(name.len() / 5) => format!("did you mean `{other}`?"),
        _ => format!("pass a .jsonl or .json file, a folder of them, or a known name: {}", names.join(", ")),
    };
    match name.split('/').collect::<Vec<_>>()[..] {
        [owner, repository] if !here.is_dir() && !owner.is_empty() && !repository.contains('.') => (
            "no such file or folder, and this build does not download from a hub".to_owned(),
            format!("download {name} and pass its folder or .jsonl file"),
        ),
        _ => ("no such file, folder or known name".to_owned(), hint),
    }
}

/// Levenshtein's distance: how many characters to insert, delete or replace.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}

/// The data files directly in a folder; hidden files and the metadata of `datasets` are none.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in folder.read_dir().map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_data = matches!(extension(&path).as_str(), "jsonl" | "json")
            && !name.starts_with('.')
            && !NOT_DATA.contains(&name.as_ref());
        if is_data && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// The extension of a file that is neither JSON nor without one (as a pipe is).
fn other_format(path: &Path) -> Option<String> {
    Some(extension(path)).filter(|extension| !matches!(extension.as_str(), "jsonl" | "json" | ""))
}
