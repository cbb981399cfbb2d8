//! Registries that lie, break, hang or refuse: each a clear error, and nothing left behind.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::io::Write;
use std::time::{Duration, Instant};

use common::faulty::{Answer, Faulty};
use common::{Blob, Flavor, Packing, TestImage, TestStore, digest, layer, noise};
use hull_image::{Auth, PullError, StoreError};

fn image(seed: u64) -> TestImage {
    TestImage::new(
        Flavor::Oci,
        &[
            (layer(&[("base", &noise(300_000, seed))]), Packing::Gzip),
            (
                layer(&[("bin/tool", &noise(200_000, seed + 1)), ("empty", b"")]),
                Packing::Zstd,
            ),
            (layer(&[("etc/name", b"x")]), Packing::Plain),
        ],
    )
}

fn blob_path(blob: &Blob) -> String {
    format!("/v2/a/b/blobs/{}", blob.digest())
}

/// What a registry says in an error (distribution-spec, "Error Codes").
fn said(message: &str) -> String {
    serde_json::json!({"errors": [{"code": "X", "message": message}]}).to_string()
}

/// Serves a good image, damages it, pulls it, and checks that nothing stays.
async fn damaged(damage: impl FnOnce(&Faulty, &TestImage)) -> PullError {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    damage(&faulty, &image);
    let test = TestStore::with(None, |limits| {
        limits.no_progress = Duration::from_millis(400);
        limits.retries = 1;
    })
    .await;
    let result = test
        .store
        .pull(&format!("{}/a/b:t", faulty.address()), None)
        .await;
    assert_eq!(
        test.leftovers(),
        [""; 0],
        "something is left after {result:?}"
    );
    assert!(test.store.list().await.unwrap().is_empty());
    let error = result.unwrap_err();
    println!("{error}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn the_undamaged_image_is_pulled() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    let test = TestStore::open().await;
    let id = test
        .store
        .pull(&format!("{}/a/b:t", faulty.address()), None)
        .await
        .unwrap();
    assert_eq!(id.as_str(), image.id());
    assert_eq!(test.leftovers().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_flipped_bytes_is_a_digest_mismatch() {
    for position in [5, 100_000, 290_000] {
        let error = damaged(|faulty, image| {
            let mut bytes = image.layers[0].bytes.clone();
            bytes[position] ^= 0x40;
            faulty.set(
                &blob_path(&image.layers[0]),
                vec![Answer::Body(String::new(), bytes)],
            );
        })
        .await;
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_another_length_is_a_digest_mismatch() {
    for change in [
        |bytes: &mut Vec<u8>| bytes.extend(b"more"),
        |bytes: &mut Vec<u8>| bytes.truncate(100),
    ] {
        let error = damaged(|faulty, image| {
            let mut bytes = image.layers[1].bytes.clone();
            change(&mut bytes);
            faulty.set(
                &blob_path(&image.layers[1]),
                vec![Answer::Body(String::new(), bytes)],
            );
        })
        .await;
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_no_archive_is_corrupt() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&noise(100_000, 3)).unwrap();
    let cut_gzip = gzip.finish().unwrap()[..50_000].to_vec();
    let escape = {
        let mut bytes = layer(&[("aa/evil", b"x")]);
        bytes[0..2].copy_from_slice(b"..");
        // The sum of the bytes changed with the name.
        let sum: u32 = (0..512)
            .map(|i| {
                if (148..156).contains(&i) {
                    32
                } else {
                    u32::from(bytes[i])
                }
            })
            .sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    };
    for (bytes, reason) in [
        (
            b"this is not a tar archive, whatever its type says".repeat(20),
            "number",
        ),
        (cut_gzip, ""),
        (escape, "leaves the root"),
    ] {
        let error = damaged(|faulty, good| {
            let diff_ids = [digest(&bytes)];
            let config = serde_json::json!({
                "os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}
            });
            let blob = Blob {
                bytes: bytes.clone(),
                media_type: good.layers[0].media_type.clone(),
            };
            let bad =
                TestImage::from_parts(Flavor::Oci, config.to_string().into_bytes(), vec![blob]);
            faulty.put("a/b", "t", &bad);
        })
        .await;
        assert!(
            matches!(&error, PullError::CorruptLayer { reason: actual, .. } if actual.contains(reason)),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_the_configured_one_is_a_digest_mismatch() {
    let error = damaged(|faulty, good| {
        let config = String::from_utf8(good.config.bytes.clone()).unwrap();
        let config = config.replace(&digest(&layer(&[("etc/name", b"x")])), &digest(b"other"));
        let bad = TestImage::from_parts(Flavor::Oci, config.into_bytes(), good.layers.clone());
        faulty.put("a/b", "t", &bad);
    })
    .await;
    assert!(
        matches!(&error, PullError::DigestMismatch { what, .. } if what.contains("content of layer")),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_is_refused() {
    let error = damaged(|faulty, image| {
        faulty.set(
            &blob_path(&image.config),
            vec![Answer::Body(String::new(), b"{}".to_vec())],
        );
    })
    .await;
    assert!(
        matches!(error, PullError::DigestMismatch { .. }),
        "{error:?}"
    );
    for config in [
        r#"{"os":"linux","architecture":"arm64","rootfs":{"diff_ids":[]}}"#,
        r#"{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[]}}"#,
        r#"{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:../../x"]}}"#,
        "nonsense",
    ] {
        let error = damaged(|faulty, good| {
            let bad = TestImage::from_parts(Flavor::Oci, config.into(), good.layers.clone());
            faulty.put("a/b", "t", &bad);
        })
        .await;
        assert!(matches!(error, PullError::Unsupported { .. }), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_media_types_are_refused() {
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "text/html",
        "",
    ] {
        let error = damaged(|faulty, good| {
            let mut layers = good.layers.clone();
            layers[2].media_type = media_type.into();
            let bad = TestImage::from_parts(Flavor::Oci, good.config.bytes.clone(), layers);
            faulty.put("a/b", "t", &bad);
        })
        .await;
        assert!(matches!(error, PullError::Unsupported { .. }), "{error:?}");
    }
    let error = damaged(|faulty, _| {
        let page = Answer::Body("text/html".into(), b"<html>log in first</html>".to_vec());
        faulty.set("/v2/a/b/manifests/t", vec![page]);
    })
    .await;
    assert!(matches!(error, PullError::Unsupported { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found() {
    let missing = Answer::Status(
        404,
        String::new(),
        r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.into(),
    );
    let error = damaged(|faulty, _| faulty.set("/v2/a/b/manifests/t", vec![missing.clone()])).await;
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
    let error = damaged(|faulty, image| {
        faulty.set(&blob_path(&image.layers[1]), vec![missing.clone()]);
    })
    .await;
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_dies_in_mid_layer_is_unavailable() {
    let error = damaged(|faulty, image| {
        let cut = Answer::Cut(image.layers[0].bytes.clone(), 100_000);
        faulty.set(&blob_path(&image.layers[0]), vec![cut]);
    })
    .await;
    assert!(
        matches!(error, PullError::RegistryUnavailable { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_is_a_timeout() {
    let started = Instant::now();
    let error = damaged(|faulty, _| faulty.set("/v2/a/b/manifests/t", vec![Answer::Hang])).await;
    assert!(matches!(error, PullError::Timeout { .. }), "{error:?}");
    let error = damaged(|faulty, image| {
        let stall = Answer::Stall(image.layers[0].bytes.clone(), 100_000);
        faulty.set(&blob_path(&image.layers[0]), vec![stall]);
    })
    .await;
    assert!(matches!(error, PullError::Timeout { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_errors_of_its_own_is_unavailable() {
    for status in [500, 502, 429] {
        let error = damaged(|faulty, _| {
            let broken = Answer::Status(status, String::new(), said("out of order"));
            faulty.set("/v2/a/b/manifests/t", vec![broken]);
        })
        .await;
        assert!(
            matches!(&error, PullError::RegistryUnavailable { message, .. } if message.contains("out of order")),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_manifest_is_too_large() {
    let error = damaged(|faulty, _| {
        let endless = Answer::Body("application/json".into(), vec![b' '; 5 << 20]);
        faulty.set("/v2/a/b/manifests/t", vec![endless]);
    })
    .await;
    assert!(matches!(error, PullError::TooLarge { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_not_there_is_unavailable() {
    let test = TestStore::open().await;
    let error = test.store.pull("127.0.0.1:1/a/b", None).await.unwrap_err();
    assert!(
        matches!(&error, PullError::RegistryUnavailable { message, .. } if message.contains("refused")),
        "{error:?}"
    );
    let error = test
        .store
        .pull("NotALowerCaseName", None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, PullError::InvalidReference { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_is_held_to() {
    let (faulty, good) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &good);
    let test = TestStore::open().await;
    let wanted = digest(b"wanted");
    let manifest = Answer::Body(
        good.manifest.media_type.clone(),
        good.manifest.bytes.clone(),
    );
    faulty.set(&format!("/v2/a/b/manifests/{wanted}"), vec![manifest]);
    let error = test
        .store
        .pull(&format!("{}/a/b@{wanted}", faulty.address()), None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, PullError::DigestMismatch { .. }),
        "{error:?}"
    );
    assert_eq!(test.leftovers(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_transfer_goes_on_where_it_stopped() {
    for ranges in [true, false] {
        let (faulty, image) = (Faulty::start().await, image(1));
        faulty.put("a/b", "t", &image);
        if ranges {
            faulty.do_ranges();
        }
        let bytes = image.layers[0].bytes.clone();
        let whole = Answer::Body(String::new(), bytes.clone());
        let busy = Answer::Status(503, String::new(), String::new());
        faulty.set(
            &blob_path(&image.layers[0]),
            vec![
                busy,
                Answer::Cut(bytes.clone(), 10),
                Answer::Cut(bytes, 10),
                whole,
            ],
        );
        let test = TestStore::open().await;
        test.store
            .pull(&format!("{}/a/b:t", faulty.address()), None)
            .await
            .unwrap();
        let asked = faulty.requests(&image.layers[0].digest());
        assert_eq!(asked.len(), 4);
        assert_eq!(asked[3].headers["range"], "bytes=10-");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_do_the_work_once() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    for blob in &image.layers {
        let slow = Answer::Slow(blob.bytes.clone(), 20_000, Duration::from_millis(10));
        faulty.set(&blob_path(blob), vec![slow]);
    }
    let test = TestStore::open().await;
    let name = format!("{}/a/b:t", faulty.address());
    let pulls: Vec<_> = (0..8)
        .map(|_| {
            let (store, name) = (test.store.clone(), name.clone());
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap().as_str(), image.id());
    }
    for blob in &image.layers {
        // The others show that they may read it.
        let first_byte = Some("bytes=0-0");
        let asked = faulty.requests(&blob.digest());
        let ranges = asked.iter().map(|request| request.headers.get("range"));
        let whole = ranges.filter(|range| range.map(String::as_str) != first_byte);
        assert_eq!(whole.count(), 1);
    }
    assert_eq!(test.leftovers().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_pull_leaves_nothing() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    let stall = Answer::Stall(image.layers[0].bytes.clone(), 100_000);
    faulty.set(&blob_path(&image.layers[0]), vec![stall]);
    let test = TestStore::open().await;
    let name = format!("{}/a/b:t", faulty.address());
    let pull = test.store.pull(&name, None);
    assert!(
        tokio::time::timeout(Duration::from_millis(500), pull)
            .await
            .is_err()
    );
    let deadline = Instant::now() + Duration::from_secs(5);
    while !test.leftovers().is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(test.leftovers(), [""; 0]);
    faulty.put("a/b", "t", &image);
    test.store.pull(&name, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_pull_leaves_the_layers_of_others() {
    let (faulty, good) = (Faulty::start().await, image(1));
    faulty.put("a/b", "good", &good);
    let test = TestStore::open().await;
    test.store
        .pull(&format!("{}/a/b:good", faulty.address()), None)
        .await
        .unwrap();
    let before = test.leftovers();
    let bad = TestImage::new(
        Flavor::Oci,
        &[
            (layer(&[("base", &noise(300_000, 1))]), Packing::Gzip),
            (layer(&[("new", b"x")]), Packing::Gzip),
            (layer(&[("gone", b"x")]), Packing::Gzip),
        ],
    );
    faulty.put("a/b", "bad", &bad);
    faulty.set(&blob_path(&bad.layers[2]), vec![]);
    let error = test
        .store
        .pull(&format!("{}/a/b:bad", faulty.address()), None)
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
    assert_eq!(test.leftovers(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_used_as_the_registry_asks() {
    let (faulty, image) = (Faulty::start().await, image(1));
    let name = format!("{}/a/b:t", faulty.address());
    let guard = |authorization: &str, challenge: &str| {
        faulty.put("a/b", "t", &image);
        let guarded = |then| Answer::Guarded {
            authorization: authorization.into(),
            challenge: challenge.into(),
            then: Box::new(then),
        };
        let manifest = Answer::Body(
            image.manifest.media_type.clone(),
            image.manifest.bytes.clone(),
        );
        faulty.set("/v2/a/b/manifests/t", vec![guarded(manifest)]);
        for blob in image.layers.iter().chain([&image.config]) {
            let answer = Answer::Body(String::new(), blob.bytes.clone());
            faulty.set(&blob_path(blob), vec![guarded(answer)]);
        }
    };
    let password = Auth {
        username: "user".into(),
        password: "secret".into(),
        ..Auth::default()
    };
    let realm = format!(
        "Bearer realm=\"http://{}/token\",service=\"svc\"",
        faulty.address()
    );
    let token = |text: &str| vec![Answer::Body("application/json".into(), text.into())];

    guard("Basic dXNlcjpzZWNyZXQ=", "Basic realm=\"x\"");
    let test = TestStore::open().await;
    test.store
        .pull(&name, Some(password.clone()))
        .await
        .unwrap();

    guard("Bearer t1", &realm);
    faulty.set("/token", token(r#"{"token":"t1"}"#));
    let test = TestStore::open().await;
    test.store
        .pull(&name, Some(password.clone()))
        .await
        .unwrap();
    let asked = faulty.requests("/token");
    assert_eq!(
        asked[0].target,
        "/token?service=svc&scope=repository%3Aa%2Fb%3Apull"
    );
    assert_eq!(asked[0].headers["authorization"], "Basic dXNlcjpzZWNyZXQ=");
    assert_eq!(asked.len(), 1, "one token serves all requests of a pull");

    guard("Bearer t2", &realm);
    faulty.set("/token", token(r#"{"access_token":"t2"}"#));
    let identity = Auth {
        identity_token: "me".into(),
        ..Auth::default()
    };
    let test = TestStore::open().await;
    test.store.pull(&name, Some(identity)).await.unwrap();
    let asked = faulty.requests("/token").pop().unwrap();
    assert_eq!(asked.method, "POST");
    assert!(
        asked
            .body
            .contains("grant_type=refresh_token&refresh_token=me"),
        "{}",
        asked.body
    );

    guard("Bearer t3", &realm);
    let registry = Auth {
        registry_token: "t3".into(),
        ..Auth::default()
    };
    let test = TestStore::open().await;
    test.store.pull(&name, Some(registry)).await.unwrap();

    guard("Bearer t4", &realm);
    let elsewhere = Auth {
        server_address: "other.example".into(),
        ..password.clone()
    };
    faulty.set(
        "/token",
        vec![Answer::Status(401, String::new(), said("who are you"))],
    );
    for auth in [None, Some(elsewhere), Some(password)] {
        let given = auth
            .as_ref()
            .is_some_and(|auth| auth.server_address.is_empty());
        let test = TestStore::open().await;
        let error = test.store.pull(&name, auth).await.unwrap_err();
        assert!(
            matches!(&error, PullError::Unauthorized { message, .. } if message.contains("who are you")),
            "{error:?}"
        );
        assert!(!error.to_string().contains("secret"));
        let asked = faulty.requests("/token").pop().unwrap();
        assert_eq!(asked.headers.contains_key("authorization"), given);
        assert_eq!(test.leftovers(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_in_order_and_told_whom_they_stand_for() {
    let (mirror, upstream, image) = (Faulty::start().await, Faulty::start().await, image(1));
    mirror.put("proxy/a/b", "t", &image);
    upstream.put("a/b", "t", &image);
    // A mirror that may not say what a tag is, one that is down, and one that lacks the image.
    let config = tempfile::tempdir().unwrap();
    let directory = config.path().join("registry.example");
    std::fs::create_dir(&directory).unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}/v2/proxy\"]\n\
         capabilities = [\"pull\"]\noverride_path = true\n",
        upstream.address(),
        mirror.address()
    );
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let test = TestStore::with(Some(config.path().to_owned()), |limits| limits.retries = 0).await;
    let id = test
        .store
        .pull("registry.example/a/b:t", None)
        .await
        .unwrap();
    assert_eq!(id.as_str(), image.id());
    let tags = vec!["registry.example/a/b:t".to_owned()];
    assert_eq!(
        test.store
            .get("registry.example/a/b:t")
            .await
            .unwrap()
            .unwrap()
            .repo_tags,
        tags
    );
    assert!(mirror.requests("/manifests/").is_empty());
    assert_eq!(mirror.requests("/blobs/").len(), 4);
    assert_eq!(upstream.requests("/blobs/").len(), 0);
    let first = &mirror.requests("/blobs/")[0].target;
    assert!(
        first.starts_with("/v2/proxy/a/b/blobs/") && first.ends_with("?ns=registry.example"),
        "{first}"
    );

    std::fs::write(directory.join("hosts.toml"), "server = [").unwrap();
    let error = test
        .store
        .pull("registry.example/a/b:t", None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, PullError::RegistryConfig { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"])
        .arg(directory.path())
        .output();
    if !mount.as_ref().is_ok_and(|mount| mount.status.success()) {
        println!("SKIPPED: mount a small tmpfs: {mount:?}; run as root");
        return;
    }
    let faulty = Faulty::start().await;
    let image = TestImage::new(
        Flavor::Docker,
        &[
            (layer(&[("a", &[7; 100_000])]), Packing::Gzip),
            (layer(&[("big", &[1; 8 << 20])]), Packing::Gzip),
        ],
    );
    faulty.put("a/b", "t", &image);
    let root = directory.path().join("images");
    let config = common::worker::store(&root);
    let store = hull_image::ImageStore::open(config).await.unwrap();
    let error = store
        .pull(&format!("{}/a/b:t", faulty.address()), None)
        .await;
    let left: usize = ["layers", "images", "tmp"]
        .iter()
        .map(|name| std::fs::read_dir(root.join(name)).unwrap().count())
        .sum();
    drop(store);
    let unmount = std::process::Command::new("umount")
        .arg(directory.path())
        .status()
        .unwrap();
    assert!(unmount.success());
    assert!(
        matches!(error, Err(PullError::Store(StoreError::NoSpace { .. }))),
        "{error:?}"
    );
    assert_eq!(left, 0);
}

const CRASH_ROOT: &str = "HULL_TEST_CRASH_ROOT";
const CRASH_IMAGE: &str = "HULL_TEST_CRASH_IMAGE";

/// Not a test of its own: the process that the next test kills.
#[tokio::test(flavor = "multi_thread")]
async fn crash_victim() {
    let (Ok(root), Ok(image)) = (std::env::var(CRASH_ROOT), std::env::var(CRASH_IMAGE)) else {
        return;
    };
    let config = common::worker::store(root);
    let store = hull_image::ImageStore::open(config).await.unwrap();
    store.pull(&image, None).await.unwrap();
    store.remove(&image).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pull_costs_nothing_but_the_pull() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    for blob in &image.layers {
        let slow = Answer::Slow(blob.bytes.clone(), 10_000, Duration::from_millis(5));
        faulty.set(&blob_path(blob), vec![slow]);
    }
    let name = format!("{}/a/b:t", faulty.address());
    let mut cut_short = 0;
    for delay in (0..500).step_by(50) {
        let test = TestStore::open().await;
        let directory = test.directory;
        drop(test.store);
        let root = directory.path().join("images");
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_victim"])
            .env(CRASH_ROOT, &root)
            .env(CRASH_IMAGE, &name)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(delay)).await;
        victim.kill().unwrap();
        cut_short += usize::from(!victim.wait().unwrap().success());
        let config = common::worker::store(&root);
        let store = hull_image::ImageStore::open(config).await.unwrap();
        let test = TestStore { directory, store };
        let known = test.store.list().await.unwrap();
        // Killed between the record and the removal, the image is whole; otherwise nothing is there.
        assert_eq!(test.leftovers().len(), if known.is_empty() { 0 } else { 4 });
        for image in known {
            test.store.disk(&image.id).await.unwrap();
        }
        test.store.pull(&name, None).await.unwrap();
        assert_eq!(test.leftovers().len(), 4);
    }
    assert!(cut_short > 3, "only {cut_short} of 10 were killed in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_and_removals_at_the_same_time_never_lose_a_layer() {
    let faulty = Faulty::start().await;
    // Images that share their base, so that removing one threatens the others' pulls.
    let images: Vec<TestImage> = (0..4u8)
        .map(|own| {
            TestImage::new(
                Flavor::Oci,
                &[
                    (layer(&[("base", &noise(50_000, 1))]), Packing::Gzip),
                    (layer(&[("own", &[own; 10])]), Packing::Gzip),
                ],
            )
        })
        .collect();
    for (number, image) in images.iter().enumerate() {
        faulty.put("a/b", &number.to_string(), image);
    }
    let test = TestStore::open().await;
    let workers: Vec<_> = (0..images.len())
        .map(|number| {
            let (store, name) = (
                test.store.clone(),
                format!("{}/a/b:{number}", faulty.address()),
            );
            tokio::spawn(async move {
                for round in 0..15 {
                    let id = store.pull(&name, None).await.unwrap();
                    store.lease(&id, &name).await.unwrap();
                    assert_eq!(store.disk(&id).await.unwrap().len(), 3);
                    if round % 2 == 0 {
                        store.remove(&name).await.unwrap();
                        assert_eq!(store.disk(&id).await.unwrap().len(), 3);
                        store.release(&name).await.unwrap();
                    } else {
                        store.release(&name).await.unwrap();
                        store.remove(id.as_str()).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(test.leftovers(), [""; 0]);
}
