use std::io::Cursor;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::config::Limits;
use crate::digest::Digest;

/// What `docker save` would write of an image with one layer of so many files without contents.
fn saved(files: usize) -> Cursor<Vec<u8>> {
    let archive = |members: &mut dyn Iterator<Item = (String, Vec<u8>)>| {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, contents) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(contents.len() as u64);
            tar.append_data(&mut header, path, &contents[..]).unwrap();
        }
        tar.into_inner().unwrap()
    };
    let layer = archive(&mut (0..files).map(|number| (number.to_string(), Vec::new())));
    let config = json!({"rootfs": {"diff_ids": [Digest::of(&layer)]}}).to_string();
    let manifest = json!([{"Config": "c", "RepoTags": ["a:1"], "Layers": ["l"]}]).to_string();
    Cursor::new(archive(
        &mut [
            ("l".into(), layer),
            ("c".into(), config.into_bytes()),
            ("manifest.json".into(), manifest.into_bytes()),
        ]
        .into_iter(),
    ))
}

async fn store(directory: &tempfile::TempDir, tree_memory: u64) -> ImageStore {
    let mut config = crate::test_worker::store(directory.path());
    config.limits.tree_memory = tree_memory;
    ImageStore::open(config).await.unwrap()
}

async fn import(store: ImageStore, archive: Cursor<Vec<u8>>) -> Result<Vec<ImageId>, PullError> {
    store.import(archive, None, &watch::Sender::default()).await
}

fn left(directory: &tempfile::TempDir) -> usize {
    let count = |name: &str| {
        std::fs::read_dir(directory.path().join(name))
            .unwrap()
            .count()
    };
    ["layers", "images", "tmp"].map(count).iter().sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_waits_for_the_memory_that_others_have() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(&directory, 64 << 20).await;
    let soon = Duration::from_millis(300);
    for share in 0..3 {
        let budget = &store.shared.budget;
        let (mut pulls, mut transfers, mut trees) = (Vec::new(), Vec::new(), Vec::new());
        match share {
            0 => {
                for _ in 0..Limits::default().parallel_pulls {
                    pulls.push(budget.pull().await.unwrap());
                }
            }
            1 => {
                for _ in 0..Limits::default().parallel_transfers {
                    transfers.push(budget.transfer().await.unwrap());
                }
            }
            _ => trees.push(budget.tree(u64::MAX).await.unwrap()),
        }
        let mut work = tokio::spawn(import(store.clone(), saved(10 + share)));
        assert!(
            tokio::time::timeout(soon, &mut work).await.is_err(),
            "{share}"
        );
        drop((pulls, transfers, trees));
        work.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_comes_back_whatever_happens() {
    let directory = tempfile::tempdir().unwrap();
    // Enough for the thousand, not for the ten thousand.
    let store = store(&directory, 3 << 20).await;
    let idle = store.shared.budget.free();
    let error = import(store.clone(), saved(20_000)).await.unwrap_err();
    assert!(
        matches!(&error, PullError::TooLarge { unit, .. } if unit.contains("memory")),
        "{error}"
    );
    assert_eq!(left(&directory), 0);
    assert_eq!(store.shared.budget.free(), idle);

    let mut broken = saved(1000);
    broken.get_mut()[512 * 700] ^= 1;
    import(store.clone(), broken).await.unwrap_err();
    let abandoned = tokio::spawn(import(store.clone(), saved(1000)));
    tokio::time::sleep(Duration::from_millis(20)).await;
    abandoned.abort();
    import(store.clone(), saved(1000)).await.unwrap();
    while store.shared.budget.free() != idle {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
