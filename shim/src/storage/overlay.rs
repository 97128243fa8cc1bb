//! Overlay mounts: many layers make an option string longer than the page that mount(2) reads, so paths are made
//! relative to the directory that the layers share.

use std::path::{Path, PathBuf};

use super::StorageError;

/// Bytes of options that mount(2) takes, with the final zero.
pub const PAGE: usize = 4096;

/// Options ready for mount(2), and the directory to call it from.
#[derive(Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The option string.
    pub data: String,
    /// The working directory that relative paths are meant from.
    pub directory: Option<PathBuf>,
}

/// The value of the option that names the layers.
fn lowerdir(options: &[String]) -> Result<&str, StorageError> {
    options.iter().find_map(|option| option.strip_prefix("lowerdir=")).ok_or(StorageError::NoLowerdir)
}

/// The layers, topmost first.
///
/// # Errors
/// When there are none.
pub fn layers(options: &[String]) -> Result<Vec<PathBuf>, StorageError> {
    let (mut layers, mut layer) = (Vec::new(), String::new());
    let mut letters = lowerdir(options)?.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => layer.extend(letters.next()),
            ':' => layers.push(PathBuf::from(std::mem::take(&mut layer))),
            letter => layer.push(letter),
        }
    }
    layers.push(layer.into());
    Ok(layers)
}

/// Makes the options fit.
pub fn prepare(options: &[String]) -> Result<Prepared, StorageError> {
    let lowerdir = lowerdir(options)?;
    let data = options.join(",");
    if data.len() < PAGE {
        return Ok(Prepared { data, directory: None });
    }
    let layers: Vec<&str> = lowerdir.split(':').collect();
    let Some(directory) = common_directory(&layers) else {
        return Err(StorageError::TooManyLayers(data.len()));
    };
    let relative: Vec<&str> =
        layers.iter().map(|layer| layer.get(directory.len() + 1..).unwrap_or_default()).collect();
    let relative = format!("lowerdir={}", relative.join(":"));
    let options: Vec<&str> = options
        .iter()
        .map(|option| if option.starts_with("lowerdir=") { relative.as_str() } else { option.as_str() })
        .collect();
    let data = options.join(",");
    if data.len() < PAGE {
        Ok(Prepared { data, directory: Some(Path::new(directory).to_owned()) })
    } else {
        Err(StorageError::TooManyLayers(data.len()))
    }
}

/// The longest directory that all absolute paths lie in.
fn common_directory<'a>(paths: &[&'a str]) -> Option<&'a str> {
    let first = *paths.first()?;
    let mut directory = first.rsplit_once('/')?.0;
    // A colon within a layer's path is written with a backslash, and such a path is left alone.
    if paths.iter().any(|path| !path.starts_with('/') || path.contains('\\')) {
        return None;
    }
    while !paths.iter().all(|path| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))) {
        directory = directory.rsplit_once('/')?.0;
    }
    Some(directory).filter(|directory| !directory.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(layers: usize) -> Vec<String> {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<String> = (0..layers).map(|layer| format!("{root}/{layer}/fs")).collect();
        vec![
            "index=off".to_owned(),
            format!("workdir={root}/999/work"),
            format!("upperdir={root}/999/fs"),
            format!("lowerdir={}", lower.join(":")),
        ]
    }

    #[test]
    fn few_layers_stay_as_they_are() {
        let prepared = prepare(&options(3)).unwrap();
        assert_eq!(prepared, Prepared { data: options(3).join(","), directory: None });
    }

    #[test]
    fn layers_are_told_apart() {
        let layers = |text: &str| layers(&["ro".to_owned(), format!("lowerdir={text}")]).unwrap();
        assert_eq!(layers("/a:/b"), [Path::new("/a"), Path::new("/b")]);
        assert_eq!(layers(r"/a\:1:/b\\"), [Path::new("/a:1"), Path::new(r"/b\")]);
        assert!(super::layers(&[]).is_err());
    }

    #[test]
    fn many_layers_become_relative() {
        let prepared = prepare(&options(200)).unwrap();
        assert!(prepared.data.ends_with(":198/fs:199/fs") && prepared.data.len() < PAGE);
        assert!(prepared.data.contains("upperdir=/var/lib"));
        assert!(prepared.directory.unwrap().ends_with("snapshots"));
    }

    #[test]
    fn too_many_layers_are_refused() {
        assert!(matches!(prepare(&options(2000)), Err(StorageError::TooManyLayers(_))));
        assert!(matches!(prepare(&["ro".to_owned()]), Err(StorageError::NoLowerdir)));
    }

    proptest! {
        #[test]
        fn relative_layers_mean_the_same(names in proptest::collection::vec("[a-z]{1,6}(/[a-z]{1,6}){0,2}", 2..6)) {
            let paths: Vec<String> = names.iter().map(|name| format!("/base/x/{name}")).collect();
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            let directory = common_directory(&paths).unwrap();
            for path in paths {
                let rest = &path[directory.len() + 1..];
                prop_assert_eq!(Path::new(directory).join(rest), Path::new(path));
                prop_assert!(!rest.is_empty());
            }
        }
    }
}
