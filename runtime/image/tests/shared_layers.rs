//! Layers that are on the node already: who names one has to have it, or be let in to it.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::io::Cursor;

use common::faulty::{Answer, Faulty, Request};
use common::{Blob, Flavor, Packing, TestImage, TestStore, digest, layer, noise};
use hull_image::{Auth, PullError};
use tokio::sync::watch;

const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";

fn private() -> TestImage {
    TestImage::new(
        Flavor::Oci,
        &[(layer(&[("private", &noise(200_000, 1))]), Packing::Gzip)],
    )
}

/// An image of somebody else with the private one's layer; `config` makes it another image.
fn thief(private: &TestImage, blob: Blob) -> TestImage {
    let config: serde_json::Value = serde_json::from_slice(&private.config.bytes).unwrap();
    let mut config = config;
    config["config"] = serde_json::json!({"Cmd": ["/bin/cat", "/private"]});
    TestImage::from_parts(Flavor::Oci, config.to_string().into_bytes(), vec![blob])
}

fn password() -> Option<Auth> {
    Some(Auth {
        username: "user".into(),
        password: "secret".into(),
        ..Auth::default()
    })
}

fn guarded(then: Answer) -> Answer {
    Answer::Guarded {
        authorization: BASIC.into(),
        challenge: "Basic realm=\"x\"".into(),
        then: Box::new(then),
    }
}

/// Serves the private image, to who has the password.
fn serve_private(registry: &Faulty, image: &TestImage) {
    let body = |blob: &Blob| Answer::Body(blob.media_type.clone(), blob.bytes.clone());
    registry.set(
        "/v2/own/private/manifests/t",
        vec![guarded(body(&image.manifest))],
    );
    for blob in image.layers.iter().chain([&image.config]) {
        let path = format!("/v2/own/private/blobs/{}", blob.digest());
        registry.set(&path, vec![guarded(body(blob))]);
    }
}

fn blobs(registry: &Faulty, blob: &Blob) -> (usize, usize) {
    let first =
        |request: &Request| request.headers.get("range").map(String::as_str) == Some("bytes=0-0");
    let asked = registry.requests(&blob.digest());
    let asked = asked
        .iter()
        .filter(|request| request.headers.contains_key("authorization"));
    let (first, whole): (Vec<_>, Vec<_>) = asked.partition(|request| first(request));
    (first.len(), whole.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_registry_has_to_have_the_layer_that_it_names() {
    let (own, other, image) = (Faulty::start().await, Faulty::start().await, private());
    serve_private(&own, &image);
    let test = TestStore::open().await;
    let name = format!("{}/own/private:t", own.address());
    test.store.pull(&name, password()).await.unwrap();
    let before = test.leftovers();
    let stolen = format!("{}/a/b:t", other.address());
    let bytes = &image.layers[0].bytes;

    // It knows the digests and can say yes to anything, but has not the bytes.
    let copied = thief(&image, image.layers[0].clone());
    let path = format!("/v2/a/b/blobs/{}", image.layers[0].digest());
    for answer in [
        Answer::Body(String::new(), vec![0; bytes.len()]),
        Answer::Body(String::new(), bytes[..1].to_vec()),
        Answer::CutFrom(bytes.clone(), 0, 1),
        Answer::Status(404, String::new(), String::new()),
    ] {
        other.put("a/b", "t", &copied);
        other.set(&path, vec![answer]);
        test.store.pull(&stolen, None).await.unwrap_err();
        assert_eq!(test.leftovers(), before);
    }
    // Its own bytes under the name of that content.
    let mut mine = image.layers[0].clone();
    mine.bytes = layer(&[("mine", b"x")]);
    other.put("a/b", "t", &thief(&image, mine));
    let error = test.store.pull(&stolen, None).await.unwrap_err();
    assert!(
        matches!(error, PullError::DigestMismatch { .. }),
        "{error:?}"
    );
    assert_eq!(test.leftovers(), before);

    // Who has it gets it, and is known to have it from then on.
    other.put("a/b", "t", &copied);
    test.store.pull(&stolen, None).await.unwrap();
    let asked = other.requests(&path).len();
    test.store.pull(&stolen, None).await.unwrap();
    let asked = &other.requests(&path)[asked..];
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].headers["range"], "bytes=0-0");
    assert_eq!(test.count("layers"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_says_who_may_read_its_layer() {
    let (registry, image) = (Faulty::start().await, private());
    serve_private(&registry, &image);
    let test = TestStore::open().await;
    let name = format!("{}/own/private:t", registry.address());
    test.store.pull(&name, password()).await.unwrap();
    assert_eq!(blobs(&registry, &image.layers[0]), (0, 1));

    // The same image again takes its right alone, and needs it although the image is there.
    test.store.pull(&name, password()).await.unwrap();
    assert_eq!(blobs(&registry, &image.layers[0]), (1, 1));
    let wrong = Some(Auth {
        username: "user".into(),
        password: "wrong".into(),
        ..Auth::default()
    });
    for auth in [None, wrong] {
        let error = test.store.pull(&name, auth).await.unwrap_err();
        assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");
    }

    // Another repository of the registry: with the layer, and without.
    let path = format!("/v2/a/b/blobs/{}", image.layers[0].digest());
    registry.put("a/b", "t", &thief(&image, image.layers[0].clone()));
    let stolen = format!("{}/a/b:t", registry.address());
    for status in [401, 403, 404] {
        registry.set(
            &path,
            vec![Answer::Status(status, String::new(), String::new())],
        );
        test.store.pull(&stolen, None).await.unwrap_err();
        assert!(test.store.get(&stolen).await.unwrap().is_none());
    }
    let whole = Answer::Body(String::new(), image.layers[0].bytes.clone());
    registry.set(&path, vec![whole]);
    test.store.pull(&stolen, None).await.unwrap();
    let last = registry.requests(&path).pop().unwrap();
    assert_eq!(last.headers["range"], "bytes=0-0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_has_to_have_the_layer_that_it_names() {
    let (registry, image) = (Faulty::start().await, private());
    serve_private(&registry, &image);
    let test = TestStore::open().await;
    let name = format!("{}/own/private:t", registry.address());
    test.store.pull(&name, password()).await.unwrap();
    let before = test.leftovers();
    let archive = |plain: &[u8]| {
        let config = thief(&image, image.layers[0].clone()).config.bytes;
        let manifest = serde_json::json!([{
            "Config": "config", "RepoTags": ["a.b/c:1"], "Layers": ["layer"],
        }]);
        Cursor::new(layer(&[
            ("layer", plain),
            ("config", &config),
            ("manifest.json", manifest.to_string().as_bytes()),
        ]))
    };
    let import = |plain: &[u8]| {
        let (store, archive) = (test.store.clone(), archive(plain));
        async move { store.import(archive, None, &watch::Sender::default()).await }
    };
    let error = import(&layer(&[("mine", b"x")])).await.unwrap_err();
    assert!(
        matches!(error, PullError::DigestMismatch { .. }),
        "{error:?}"
    );
    assert_eq!(test.leftovers(), before);
    let plain = layer(&[("private", &noise(200_000, 1))]);
    let config: serde_json::Value = serde_json::from_slice(&image.config.bytes).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][0], digest(&plain));
    import(&plain).await.unwrap();
    assert_eq!(test.count("layers"), 1);
}
