//! Which containers share a shim, and so a VM.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

const ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// The group's id by the annotations of the bundle's `config.json`, or the container's own id. What is wrong with the
/// file is for Create to say.
pub fn group_id(bundle: &Path, id: &str) -> String {
    let annotated = std::fs::read(bundle.join("config.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Annotated>(&bytes).ok());
    annotated.and_then(|spec| from_annotations(&spec.annotations)).unwrap_or_else(|| id.to_owned())
}

fn from_annotations(annotations: &HashMap<String, String>) -> Option<String> {
    ANNOTATIONS.iter().find_map(|name| annotations.get(*name)).filter(|group| !group.is_empty()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(config: &str) -> String {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        group_id(bundle.path(), "own")
    }

    #[test]
    fn annotations_decide_in_order() {
        assert_eq!(group(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s"}}"#), "s");
        assert_eq!(
            group(
                r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s","io.containerd.runc.v2.group":"g"}}"#
            ),
            "g"
        );
    }

    #[test]
    fn no_annotation_no_file_and_nonsense_give_the_own_id() {
        assert_eq!(group("{}"), "own");
        assert_eq!(group("nonsense"), "own");
        assert_eq!(group_id(Path::new("/nonexistent"), "own"), "own");
    }
}
