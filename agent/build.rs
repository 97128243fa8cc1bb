//! Links the program without position independence: it is run again for every container and process, and relocating
//! it each time would cost more than what it then does. Nothing else runs in the guest's first namespaces.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-no-pie");
    println!("cargo::rustc-link-arg-bins=-static");
}
