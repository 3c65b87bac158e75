//! Which files a model's weights are in.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// The name of the weights of a model in one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The name of what says which file has which tensor of a model in several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// A folder's index, which has each tensor's file; none of a model in one file.
///
/// # Errors
/// If there is neither, it is damaged, or it names a file outside of the folder.
pub(super) fn index(folder: &Path) -> Result<Option<(PathBuf, BTreeMap<String, String>)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        if !folder.join(SINGLE_FILE).exists() {
            return Err(Error::file(folder, format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}"))
                .with_hint("only safetensors weights are read; convert a .bin checkpoint with transformers' save_pretrained"));
        }
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("is not an index: {e}")))?;
    let is_within =
        |name: &&String| Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    match index.weight_map.values().find(|name| !is_within(name)) {
        None => Ok(Some((path, index.weight_map))),
        Some(name) => {
            Err(Error::file(&path, format!("names `{name}` for weights, which is no file within its folder")))
        }
    }
}
