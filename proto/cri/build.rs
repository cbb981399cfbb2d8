//! Generates the CRI messages, clients and servers from `proto/api.proto`.
//!
//! protox parses the file, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/api.proto");
    let files = protox::compile(["api.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Maps in a fixed order: answers and logs are the same from run to run.
        .btree_map(".")
        // Holds passwords; lib.rs writes a Debug that doesn't show them.
        .skip_debug(["runtime.v1.AuthConfig"])
        // crictl's JSON: the names of the listing, enums as numbers, all optional.
        .message_attribute(
            ".",
            "#[cfg_attr(feature = \"serde\", derive(serde::Serialize, serde::Deserialize), \
             serde(default, deny_unknown_fields))]",
        )
        .field_attribute(
            "runtime.v1.KeyValue.value",
            "#[cfg_attr(feature = \"serde\", serde(with = \"crate::text\"))]",
        )
        .field_attribute(
            "runtime.v1.Mount.uidMappings",
            "#[cfg_attr(feature = \"serde\", serde(rename = \"uidMappings\"))]",
        )
        .field_attribute(
            "runtime.v1.Mount.gidMappings",
            "#[cfg_attr(feature = \"serde\", serde(rename = \"gidMappings\"))]",
        )
        .field_attribute(
            "runtime.v1.ContainerConfig.CDI_devices",
            "#[cfg_attr(feature = \"serde\", serde(rename = \"CDI_devices\"))]",
        )
        .compile_fds(files)?;
    Ok(())
}
