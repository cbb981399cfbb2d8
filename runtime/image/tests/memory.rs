//! What a pull costs in memory, whatever the layer's size. Workers' memory is limited by the kernel.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::fs;
use std::process::Command;

use common::registry::RealRegistry;
use common::{Flavor, Packing, TestImage, layer, noise};
use hull_image::ImageStore;

const ROOT: &str = "HULL_TEST_MEMORY_ROOT";
const IMAGE: &str = "HULL_TEST_MEMORY_IMAGE";
/// MiB of the large layer, for who wants to see it with more.
const LARGE: &str = "HULL_TEST_MEMORY_MIB";

/// Not a test of its own: the process whose memory the next test looks at. It says how much it had
/// at most.
#[tokio::test(flavor = "multi_thread")]
async fn puller() {
    let (Ok(root), Ok(image)) = (std::env::var(ROOT), std::env::var(IMAGE)) else {
        return;
    };
    let store = ImageStore::open(common::worker::store(root)).await.unwrap();
    store.pull(&image, None).await.unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    println!("PEAK {}", peak.unwrap().trim());
}

/// KiB that a process had at most that pulled an image.
fn peak_of_pull(image: &str) -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "puller", "--nocapture"])
        .env(ROOT, directory.path().join("images"))
        .env(IMAGE, image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    let peak = text.lines().find_map(|line| line.split_once("PEAK "));
    let peak = peak.unwrap_or_else(|| panic!("{text}")).1;
    peak.trim_end_matches(" kB").parse().unwrap()
}

/// KiB that a process had at most that pulled an image with one layer of so many MiB.
async fn peak(registry: &RealRegistry, tag: &str, mib: usize, packing: Packing) -> u64 {
    let mut contents = noise(1 << 20, 1);
    contents.resize(mib << 20, 0);
    for piece in 1..mib {
        // Every MiB another one, so that it is no hole and does not compress to nothing.
        contents.copy_within(0..1 << 20, piece << 20);
        contents[piece << 20] = piece as u8;
    }
    let image = TestImage::new(Flavor::Oci, &[(layer(&[("large", &contents)]), packing)]);
    registry.push("memory", tag, &image).await;
    let peak = peak_of_pull(&format!("{}/memory:{tag}", registry.address()));
    println!("a layer of {mib} MiB, {packing:?}: {peak} KiB at most");
    peak
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_layer_takes_no_more_memory_than_a_small_one() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let large = std::env::var(LARGE).map_or(96, |mib| mib.parse().unwrap());
    for packing in [Packing::Plain, Packing::Zstd] {
        let small = peak(&registry, &format!("small-{packing:?}"), 8, packing).await;
        let large = peak(&registry, &format!("large-{packing:?}"), large, packing).await;
        // Buffers fill as there is more to fill them. What they hold has an end.
        assert!(large < small + (24 << 10), "{small} and {large} KiB");
    }
}
