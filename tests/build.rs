//! Generates CRI's messages from `proto/cri.proto`.

use std::path::PathBuf;
use std::{env, error, fs};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    let path = out.join("cri.rs");
    // Inner attributes and inner docs are not allowed in a file that is taken in by include!.
    let kept: String = fs::read_to_string(&path)?
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    Ok(fs::write(path, kept)?)
}
