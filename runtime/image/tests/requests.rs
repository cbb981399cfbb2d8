//! How registries are asked: not more than agreed, not sooner than they like, with what is theirs.

mod common;

use std::fs;
use std::time::Duration;

use common::faulty::{Answer, Faulty};
use common::{Blob, Flavor, Packing, TestImage, TestStore, layer, noise};
use hull_image::{Auth, PullError};

fn image(layers: u8) -> TestImage {
    let layers: Vec<_> = (0..layers)
        .map(|number| {
            let contents = noise(50_000, number.into());
            (layer(&[("file", &contents)]), Packing::Gzip)
        })
        .collect();
    TestImage::new(Flavor::Oci, &layers)
}

fn blob_path(blob: &Blob) -> String {
    format!("/v2/a/b/blobs/{}", blob.digest())
}

fn manifest(image: &TestImage) -> Answer {
    let manifest = &image.manifest;
    Answer::Body(manifest.media_type.clone(), manifest.bytes.clone())
}

fn name(faulty: &Faulty) -> String {
    format!("{}/a/b:t", faulty.address())
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_fetched_side_by_side_and_not_all_at_once() {
    let (faulty, image) = (Faulty::start().await, image(7));
    faulty.put("a/b", "t", &image);
    for blob in &image.layers {
        let stall = Answer::Stall(blob.bytes.clone(), 1000);
        let whole = Answer::Body(String::new(), blob.bytes.clone());
        faulty.set(&blob_path(blob), vec![stall, whole]);
    }
    let test = TestStore::with(None, |limits| limits.parallel_layers = 2).await;
    let asked = || {
        let layers = image.layers.iter();
        let asked = layers.map(|blob| faulty.requests(&blob.digest()).len());
        asked.sum::<usize>()
    };
    let (store, name) = (test.store.clone(), name(&faulty));
    let pull = tokio::spawn(async move { store.pull(&name, None).await });
    while asked() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A third would come at once, as the first two did.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(asked(), 2);
    pull.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_registry_is_left_alone_for_as_long_as_it_asks() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    let busy = |seconds: u32| {
        let header = format!("Retry-After: {seconds}\r\n");
        let said = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"too many requests"}]}"#;
        Answer::Status(429, header, said.into())
    };
    faulty.set("/v2/a/b/manifests/t", vec![busy(1), manifest(&image)]);
    let test = TestStore::open().await;
    test.store.pull(&name(&faulty), None).await.unwrap();
    let asked = faulty.requests("/manifests/");
    assert_eq!(asked.len(), 2);
    assert!(asked[1].at - asked[0].at >= Duration::from_secs(1));

    // But not for ever.
    faulty.set("/v2/a/b/manifests/t", vec![busy(1_000_000)]);
    let test = TestStore::with(None, |limits| {
        limits.no_progress = Duration::from_millis(100);
    })
    .await;
    let error = test.store.pull(&name(&faulty), None).await.unwrap_err();
    assert!(
        matches!(&error, PullError::RegistryUnavailable { message, .. } if message.contains("too many")),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_now_and_then_does_not_end_a_large_pull() {
    let faulty = Faulty::start().await;
    faulty.do_ranges();
    let large = layer(&[("large", &noise(9 << 20, 1))]);
    let image = TestImage::new(Flavor::Oci, &[(large, Packing::Plain)]);
    faulty.put("a/b", "t", &image);
    let bytes = &image.layers[0].bytes;
    // Each connection brings a little more than a MiB, and there is no second chance.
    let mut answers: Vec<Answer> = (0..8)
        .map(|number| Answer::CutFrom(bytes.clone(), number * 1_100_000, 1_100_000))
        .collect();
    answers.push(Answer::Body(String::new(), bytes.clone()));
    faulty.set(&blob_path(&image.layers[0]), answers);
    let test = TestStore::with(None, |limits| limits.retries = 1).await;
    test.store.pull(&name(&faulty), None).await.unwrap();
    let asked = faulty.requests(&image.layers[0].digest());
    assert_eq!(asked.len(), 9);
    assert_eq!(asked[8].headers["range"], "bytes=8800000-");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_range_than_asked_for_is_not_taken() {
    let (faulty, image) = (Faulty::start().await, image(1));
    faulty.do_ranges();
    faulty.put("a/b", "t", &image);
    let bytes = image.layers[0].bytes.clone();
    faulty.set(
        &blob_path(&image.layers[0]),
        vec![
            Answer::Cut(bytes.clone(), 1000),
            Answer::CutFrom(bytes.clone(), 500, 100),
            Answer::Body(String::new(), bytes),
        ],
    );
    let test = TestStore::open().await;
    test.store.pull(&name(&faulty), None).await.unwrap();
    let asked = faulty.requests(&image.layers[0].digest());
    let ranges: Vec<_> = asked
        .iter()
        .map(|asked| asked.headers.get("range"))
        .collect();
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1].unwrap(), "bytes=1000-");
    assert_eq!(ranges[2].unwrap(), "bytes=1000-");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_in_mid_layer_is_renewed() {
    let (faulty, image) = (Faulty::start().await, image(2));
    faulty.do_ranges();
    faulty.put("a/b", "t", &image);
    let guarded = |token: &str, then| Answer::Guarded {
        authorization: format!("Bearer {token}"),
        challenge: format!(
            "Bearer realm=\"http://{}/token\",scope=\"repository:a/b:pull\"",
            faulty.address()
        ),
        then: Box::new(then),
    };
    let token = |text: &str| Answer::Body("json".into(), format!(r#"{{"token":"{text}"}}"#).into());
    let whole = |blob: &Blob| Answer::Body(String::new(), blob.bytes.clone());
    faulty.set("/token", vec![token("old"), token("new")]);
    faulty.set(
        "/v2/a/b/manifests/t",
        vec![guarded("old", manifest(&image))],
    );
    let config = &image.config;
    faulty.set(&blob_path(config), vec![guarded("old", whole(config))]);
    let [first, second] = &image.layers[..] else {
        panic!()
    };
    let rest = guarded("new", whole(first));
    faulty.set(
        &blob_path(first),
        vec![
            guarded("old", Answer::Cut(first.bytes.clone(), 10_000)),
            // Refused with the old token, let in with the new one.
            rest.clone(),
            rest,
        ],
    );
    faulty.set(&blob_path(second), vec![guarded("new", whole(second))]);
    let test = TestStore::with(None, |limits| limits.parallel_layers = 1).await;
    test.store.pull(&name(&faulty), None).await.unwrap();
    assert_eq!(faulty.requests("/token").len(), 2);
    let last = faulty.requests(&first.digest()).pop().unwrap();
    assert_eq!(last.headers["authorization"], "Bearer new");
    assert_eq!(last.headers["range"], "bytes=10000-");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_follow_a_redirect_to_another_server() {
    let (faulty, storage, image) = (Faulty::start().await, Faulty::start().await, image(1));
    faulty.put("a/b", "t", &image);
    let guarded = |then| Answer::Guarded {
        authorization: "Basic dXNlcjpzZWNyZXQ=".into(),
        challenge: "Basic realm=\"x\"".into(),
        then: Box::new(then),
    };
    faulty.set("/v2/a/b/manifests/t", vec![guarded(manifest(&image))]);
    for blob in image.layers.iter().chain([&image.config]) {
        let path = format!("/storage/{}", blob.digest());
        let location = format!("Location: http://{}{path}\r\n", storage.address());
        let redirect = Answer::Status(307, location, String::new());
        faulty.set(&blob_path(blob), vec![guarded(redirect)]);
        storage.set(&path, vec![Answer::Body(String::new(), blob.bytes.clone())]);
    }
    let test = TestStore::open().await;
    let auth = Auth {
        username: "user".into(),
        password: "secret".into(),
        ..Auth::default()
    };
    test.store.pull(&name(&faulty), Some(auth)).await.unwrap();
    let asked = storage.requests("/storage/");
    assert_eq!(asked.len(), 2);
    for request in asked {
        assert!(!request.headers.contains_key("authorization"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_of_a_host_are_sent_to_it_alone() {
    let (mirror, origin, image) = (Faulty::start().await, Faulty::start().await, image(1));
    origin.put("a/b", "t", &image);
    let config = tempfile::tempdir().unwrap();
    let directory = config.path().join("registry.example");
    fs::create_dir(&directory).unwrap();
    let mirror_url = format!("http://{}", mirror.address());
    let text = format!(
        "server = \"http://{}\"\n[host.\"{mirror_url}\"]\n\
         [host.\"{mirror_url}\".header]\nX-Team = [\"storage\"]\n",
        origin.address()
    );
    fs::write(directory.join("hosts.toml"), text).unwrap();
    let test = TestStore::with(Some(config.path().into()), |_| {}).await;
    let pulled = test.store.pull("registry.example/a/b:t", None).await;
    assert_eq!(pulled.unwrap().as_str(), image.id());
    let asked = mirror.requests("");
    assert_eq!(asked.len(), 3, "manifest, configuration, layer");
    for request in asked {
        assert_eq!(request.headers["x-team"], "storage");
        assert!(request.target.ends_with("?ns=registry.example"));
    }
    for request in origin.requests("") {
        assert!(!request.headers.contains_key("x-team"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waited_for_an_abandoned_pull_does_it_alone() {
    let (faulty, image) = (Faulty::start().await, image(2));
    faulty.put("a/b", "t", &image);
    let bytes = image.layers[0].bytes.clone();
    let path = blob_path(&image.layers[0]);
    let whole = Answer::Body(String::new(), bytes.clone());
    faulty.set(&path, vec![Answer::Stall(bytes, 10_000), whole]);
    let test = TestStore::open().await;
    let pull = || {
        let (store, name) = (test.store.clone(), name(&faulty));
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    let first = pull();
    while faulty.requests(&path).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let second = pull();
    while faulty.requests("/manifests/").len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.abort();
    assert_eq!(second.await.unwrap().unwrap().as_str(), image.id());
    assert_eq!(faulty.requests(&path).len(), 2);
    assert_eq!(test.leftovers().len(), 3);
}
