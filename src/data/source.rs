//! What a data set may be named, and the files that it then is.

use std::fs::DirEntry;
use std::path::{Path, PathBuf};

use super::spelling::meant;
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

impl Columns {
    /// All three, in that order.
    pub fn names(self) -> [&'static str; 3] {
        [self.query, self.response, self.rejected_response]
    }
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

/// A folder that is a data set.
pub(crate) struct Folder {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Its data files, sorted by name.
    pub(crate) files: Vec<PathBuf>,
    /// Whether there are folders in it, which are not looked into.
    pub(crate) has_folders: bool,
}

/// The folder that a spec names, if it is one that can be read.
pub(crate) fn folder(spec: &str) -> Option<Folder> {
    let Source { path, files, .. } = resolve_one(spec, Path::new("")).ok()?.ok()?;
    let inside = path.read_dir().ok()?.flatten();
    let is_folder =
        |entry: &DirEntry| entry.path().is_dir() && !entry.file_name().to_string_lossy().starts_with('.');
    let has_folders = inside.into_iter().any(|entry| is_folder(&entry));
    Some(Folder { path, files, has_folders })
}

/// The spec with the path of what it is on disk in full.
pub(crate) fn in_full(spec: &str) -> String {
    let full = |name: &str| {
        let path = std::path::absolute(find(name, Path::new(""))?).ok()?;
        path.into_os_string().into_string().ok()
    };
    let sampled = || spec.rsplit_once('#').and_then(|(name, n)| Some(format!("{}#{n}", full(name)?)));
    full(spec).or_else(sampled).unwrap_or_else(|| spec.to_owned())
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
        .filter_map(|file| {
            Some(Path::new(name).with_file_name(file.file_name()?).to_string_lossy().into_owned())
        })
        .chain(REGISTRY.iter().map(|known| known.name.to_owned()))
        .collect();
    let hint = match meant(name, nearby.iter().map(String::as_str)) {
        Some(other) => format!("did you mean `{other}`?"),
        None => "pass a .jsonl or .json file, a folder of them, or `demo` for the demo's rows".to_owned(),
    };
    match name.split('/').collect::<Vec<_>>()[..] {
        [owner, repository] if !here.is_dir() && !owner.is_empty() && !repository.contains('.') => (
            "no such file or folder, and this build does not download from a hub".to_owned(),
            format!("download {name} and pass its folder or .jsonl file"),
        ),
        _ => ("no such file, folder or known name".to_owned(), hint),
    }
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

#[cfg(test)]
mod tests {
    use std::fs::{create_dir, write};

    use super::*;

    fn specs(specs: &[&str]) -> Vec<String> {
        specs.iter().map(|spec| (*spec).to_owned()).collect()
    }

    fn files(base: &Path, spec: &str) -> Vec<String> {
        let source = resolve(&specs(&[spec]), base).unwrap().remove(0);
        let name = |file: &PathBuf| file.strip_prefix(base).unwrap().to_string_lossy().replace('\\', "/");
        source.files.iter().map(name).collect()
    }

    #[test]
    fn files_folders_samples_and_known_names_are_found() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path();
        for file in ["b.jsonl", "a.json", "dataset_infos.json", ".hidden.jsonl", "notes.md"] {
            create_dir(base.join("folder")).ok();
            write(base.join("folder").join(file), "").unwrap();
        }
        write(base.join("one.jsonl"), "").unwrap();
        write(base.join("odd#3"), "").unwrap();
        assert_eq!(files(base, "one.jsonl"), ["one.jsonl"]);
        assert_eq!(files(base, "folder"), ["folder/a.json", "folder/b.jsonl"]);
        let told = |spec: &str| folder(base.join(spec).to_str().unwrap());
        assert!(!told("folder").unwrap().has_folders);
        create_dir(base.join("folder/.git")).unwrap();
        assert!(!told("folder#3").unwrap().has_folders, "a hidden one is none of the user's");
        create_dir(base.join("folder/more")).unwrap();
        let Folder { files: read, has_folders, .. } = told("folder").unwrap();
        assert!(has_folders && read == [base.join("folder/a.json"), base.join("folder/b.jsonl")]);
        assert!(told("one.jsonl").is_none());
        assert_eq!(files(base, "odd#3"), ["odd#3"], "a file of that very name is no sample");
        let sampled = resolve(&specs(&["one.jsonl#20", "folder/#5", "one.jsonl"]), base).unwrap();
        assert_eq!(sampled.iter().map(|source| source.sample).collect::<Vec<_>>(), [Some(20), Some(5), None]);

        let known = &REGISTRY[0];
        for local in ["shareai-llama3-dpo-zh-en-emoji.jsonl", "DPO-zh-en-emoji/data.jsonl"] {
            create_dir(base.join("DPO-zh-en-emoji")).ok();
            write(base.join(local), "").unwrap();
            for name in [known.name, known.modelscope_id, known.huggingface_id] {
                assert_eq!(files(base, name), [local], "{name}");
            }
            std::fs::remove_file(base.join(local)).unwrap();
        }
    }

    #[test]
    fn what_is_not_there_is_an_error_with_advice() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path();
        write(base.join("pairs.jsonl"), "").unwrap();
        write(base.join("table.parquet"), "").unwrap();
        create_dir(base.join("empty")).unwrap();
        for (spec, problem, hint) in [
            ("pears.jsonl", "no such file, folder or known name", "did you mean `pairs.jsonl`?"),
            ("pears.jsonl#9", "no such file, folder or known name", "did you mean `pairs.jsonl`?"),
            ("shareai-llama3-dpo-zh-emoji", "no such file", "did you mean `shareai-llama3-dpo-zh-en-emoji`?"),
            ("zzz", "no such file", "pass a .jsonl or .json file, a folder of them, or `demo`"),
            ("", "no such file", "pass a .jsonl"),
            (
                REGISTRY[0].name,
                "this build does not download",
                "hjh0119/shareAI-Llama3-DPO-zh-en-emoji from ModelScope or shareAI/DPO-zh-en-emoji",
            ),
            (
                "owner/prefs",
                "this build does not download from a hub",
                "download owner/prefs and pass its folder",
            ),
            ("table.parquet", "`.parquet` files are not read, only .jsonl and .json", "to_json"),
            ("empty", "the folder holds no .jsonl and no .json file", "to_json"),
            ("pairs.jsonl#0", "`#0` is not a number of rows", "`pairs.jsonl#500`"),
            ("pairs.jsonl#all", "`#all` is not a number of rows", "`pairs.jsonl#500`"),
        ] {
            let error = resolve(&specs(&[spec]), base).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error:?}");
            assert!(error.to_string().contains(&format!("data set `{spec}`: ")), "{error}");
            assert!(error.to_string().contains(problem), "{spec}: {error}");
            assert!(error.hint().unwrap().contains(hint), "{spec}: {:?}", error.hint());
        }
        let both = resolve(&specs(&["x.jsonl", "pairs.jsonl", "y.jsonl"]), base).unwrap_err().to_string();
        assert!(both.contains("`x.jsonl`") && both.contains("`y.jsonl`"), "all problems at once: {both}");
        assert_eq!(
            resolve(&[], base).unwrap_err().to_string(),
            "invalid configuration: no data set is given"
        );
    }
}
