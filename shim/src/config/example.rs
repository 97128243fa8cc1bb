//! `configuration.toml.example`, written from the declaration of the settings.

use super::schema::Config;

/// The whole text of the example.
fn example() -> String {
    let mut text = String::from(
        "# Settings of vmshim. This file shows every key with its default; a file that sets nothing means the same.\n\
         # It is read from /etc/vmshim/configuration.toml, or from the path that the runtime's ConfigPath option names,\n\
         # and then, in the order of their names, the files config.d/*.toml beside it.\n",
    );
    for (section, docs, entries) in Config::sections() {
        text.push('\n');
        docs.iter().for_each(|line| text.push_str(&format!("#{line}\n")));
        text.push_str(&format!("[{section}]\n"));
        for entry in entries {
            text.push('\n');
            entry.docs.iter().for_each(|line| text.push_str(&format!("#{line}\n")));
            entry.range.iter().for_each(|range| text.push_str(&format!("# {range}\n")));
            text.push_str(&format!("{} = {}\n", entry.key, entry.default));
        }
    }
    text
}

mod tests {
    use super::*;

    const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configuration.toml.example");

    #[test]
    fn the_example_in_the_repository_is_the_generated_one() {
        if std::env::var_os("VMSHIM_WRITE_EXAMPLE").is_some() {
            std::fs::write(PATH, example()).unwrap();
        }
        let stored = std::fs::read_to_string(PATH).unwrap_or_default();
        assert!(stored == example(), "run VMSHIM_WRITE_EXAMPLE=1 cargo test -p vmshim-shim example");
    }

    #[test]
    fn the_example_means_the_defaults() {
        let read = Config::parse("example", &example()).unwrap();
        assert_eq!(read, Config::default());
    }
}
