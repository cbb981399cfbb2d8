//! Where registries lead, and what becomes known of it: a registry is a stranger's, and the daemon
//! reaches what the stranger does not.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use common::faulty::{Answer, Faulty};
use common::{Flavor, Packing, TestImage, TestStore, layer, noise};
use hull_image::{Auth, PullError};

fn image() -> TestImage {
    let contents = noise(300_000, 1);
    TestImage::new(
        Flavor::Oci,
        &[(layer(&[("file", &contents)]), Packing::Gzip)],
    )
}

fn name(registry: &Faulty) -> String {
    format!("{}/a/b:t", registry.address())
}

fn redirect(to: &str) -> Answer {
    Answer::Status(307, format!("Location: {to}\r\n"), String::new())
}

fn manifest_path() -> &'static str {
    "/v2/a/b/manifests/t"
}

/// What a service says that is none of the registry's, in the form that registries' errors have.
const SECRET: &str = r#"{"errors":[{"code":"SECRET","message":"secret"}]}"#;

async fn pull(name: &str, auth: Option<Auth>) -> PullError {
    let test = TestStore::with(None, |limits| {
        limits.retries = 0;
        limits.no_progress = Duration::from_secs(2);
    })
    .await;
    let error = test.store.pull(name, auth).await.unwrap_err();
    println!("{error}");
    let told = format!("{error} {error:?}");
    assert!(!told.contains("secret"), "{told}");
    assert!(told.lines().count() == 1 && told.len() < 1500, "{told}");
    error
}

fn password() -> Option<Auth> {
    Some(Auth {
        username: "user".into(),
        password: "pass".into(),
        ..Auth::default()
    })
}

/// An address of this machine that others can reach; none, with a reason printed, without a
/// network.
fn own_address() -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Sends nothing.
    let address = socket
        .connect("198.51.100.1:9")
        .and_then(|()| socket.local_addr());
    match address {
        Ok(address) if !address.ip().is_loopback() => Some(address.ip().to_string()),
        other => {
            println!("SKIPPED: find an address of this machine: {other:?}; it needs a network");
            None
        }
    }
}

fn write_hosts(config: &Path, registry: &str, text: &str) {
    let directory = config.join(registry);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("hosts.toml"), text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_leads_nowhere_it_may_not() {
    let (registry, image) = (Faulty::start().await, image());
    registry.put("a/b", "t", &image);
    for to in [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/latest/",
        "http://2852039166/latest/",
        "https://[fe80::1]/",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://user:pass@127.0.0.1:1/",
        "http://",
    ] {
        registry.set(manifest_path(), vec![redirect(to)]);
        let started = Instant::now();
        let error = pull(&name(&registry), None).await;
        assert!(matches!(error, PullError::Misled { .. }), "{to}: {error:?}");
        // Nobody was asked.
        assert!(started.elapsed() < Duration::from_secs(2));
    }
    let round = format!("http://{}{}", registry.address(), manifest_path());
    registry.set(manifest_path(), vec![redirect(&round)]);
    let before = registry.requests("/manifests/").len();
    let error = pull(&name(&registry), None).await;
    assert!(matches!(error, PullError::Misled { .. }), "{error:?}");
    assert_eq!(registry.requests("/manifests/").len() - before, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_server_is_nowhere_it_may_not_be() {
    let registry = Faulty::start().await;
    for realm in [
        "http://169.254.169.254/latest/api/token",
        "gopher://127.0.0.1/",
        "http://user:pass@127.0.0.1:1/",
        "token",
    ] {
        let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n");
        let refused = Answer::Status(401, challenge, String::new());
        registry.set(manifest_path(), vec![refused]);
        for auth in [None, password()] {
            let error = pull(&name(&registry), auth).await;
            assert!(
                matches!(error, PullError::Misled { .. }),
                "{realm}: {error:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_the_network_leads_to_this_node_only_where_configured() {
    let Some(own) = own_address() else { return };
    let (registry, inside, image) = (
        Faulty::start_for_all().await,
        Faulty::start().await,
        image(),
    );
    registry.put("a/b", "t", &image);
    inside.put("a/b", "t", &image);
    let config = tempfile::tempdir().unwrap();
    let server = format!("server = \"http://{own}:{}\"\n", registry.port);
    write_hosts(config.path(), "registry.example", &server);
    let test = TestStore::with(Some(config.path().into()), |limits| limits.retries = 0).await;
    let to = format!("http://{}{}", inside.address(), manifest_path());
    // By its name as well.
    let by_name = to.replace("127.0.0.1", "localhost");
    let realm = |to: &str| {
        let challenge = format!("WWW-Authenticate: Bearer realm=\"{to}\"\r\n");
        Answer::Status(401, challenge, String::new())
    };
    for answer in [
        redirect(&to),
        redirect(&by_name),
        realm(&to),
        realm(&by_name),
    ] {
        registry.set(manifest_path(), vec![answer.clone()]);
        let error = test.store.pull("registry.example/a/b:t", None).await;
        let error = error.unwrap_err();
        assert!(
            matches!(error, PullError::Misled { .. }),
            "{answer:?}: {error:?}"
        );
        assert!(inside.requests("").is_empty());
    }
    let server = format!("server = \"http://{}\"\n", inside.address());
    write_hosts(config.path(), &inside.address(), &server);
    registry.set(manifest_path(), vec![redirect(&to)]);
    test.store
        .pull("registry.example/a/b:t", None)
        .await
        .unwrap();
    assert_eq!(inside.requests("").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_answer_is_not_told() {
    let (registry, other, image) = (Faulty::start().await, Faulty::start().await, image());
    registry.put("a/b", "t", &image);
    let elsewhere = format!("http://{}/x", other.address());
    registry.set(manifest_path(), vec![redirect(&elsewhere)]);
    for status in [403, 404, 429, 500] {
        let answer = Answer::Status(status, "Retry-After: 1000\r\n".into(), SECRET.into());
        other.set("/x", vec![answer]);
        let error = pull(&name(&registry), None).await.to_string();
        let told = error.contains(&status.to_string()) || error.contains("not found");
        assert!(told, "{error}");
    }
    for body in [
        r#""secret""#.to_owned(),
        r#"{"schemaVersion":"secret"}"#.into(),
        r#"{"schemaVersion":2,"config":{"digest":"secret","size":1},"layers":[]}"#.into(),
        "secret".into(),
        "[\"secret\"]".into(),
    ] {
        other.set(
            "/x",
            vec![Answer::Body("application/json".into(), body.into())],
        );
        pull(&name(&registry), None).await;
    }

    let challenge = format!("WWW-Authenticate: Bearer realm=\"{elsewhere}\"\r\n");
    let refused = Answer::Status(401, challenge, String::new());
    registry.set(manifest_path(), vec![refused]);
    for answer in [
        Answer::Status(403, String::new(), SECRET.into()),
        Answer::Status(500, String::new(), SECRET.into()),
        Answer::Body("application/json".into(), SECRET.into()),
    ] {
        other.set("/x", vec![answer]);
        pull(&name(&registry), None).await;
    }
    // The registry's own word is told, in one line; what is not in the form of it is not, as who
    // names an image may name anything that speaks HTTP.
    for (body, expected) in [
        (
            r#"{"errors":[{"code":"DENIED","message":"pay\nfirst \u001b[31m"}]}"#,
            "DENIED pay?first ?[31m",
        ),
        ("secret", "403"),
    ] {
        registry.set(
            manifest_path(),
            vec![Answer::Status(403, String::new(), body.into())],
        );
        let error = pull(&name(&registry), None).await.to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_and_headers_stay_with_the_registry() {
    let (registry, other, image) = (Faulty::start().await, Faulty::start().await, image());
    registry.put("a/b", "t", &image);
    let config = tempfile::tempdir().unwrap();
    let address = registry.address();
    let text = format!("server = \"http://{address}\"\n[header]\nX-Key = \"for the registry\"\n");
    write_hosts(config.path(), &address, &text);
    let elsewhere = format!("http://{}/x", other.address());
    let back = format!("http://{address}/back");
    registry.set(manifest_path(), vec![redirect(&elsewhere)]);
    registry.set(
        "/back",
        vec![Answer::Status(404, String::new(), String::new())],
    );
    let test = TestStore::with(Some(config.path().into()), |limits| limits.retries = 0).await;
    let token = Some(Auth {
        registry_token: "t".into(),
        ..Auth::default()
    });
    // One that asks for a password, whose own token server that would be, and one that leads back.
    let realm = format!("WWW-Authenticate: Bearer realm=\"{elsewhere}/token\"\r\n");
    for answer in [
        Answer::Status(401, realm, String::new()),
        Answer::Status(
            401,
            "WWW-Authenticate: Basic realm=\"x\"\r\n".into(),
            String::new(),
        ),
        redirect(&back),
    ] {
        other.set("/x", vec![answer]);
        for auth in [token.clone(), password()] {
            test.store.pull(&name(&registry), auth).await.unwrap_err();
        }
    }
    let own = registry.requests("/manifests/");
    assert!(
        own.iter()
            .all(|request| request.headers.contains_key("x-key"))
    );
    assert_eq!(own[0].headers["authorization"], "Bearer t");
    assert!(other.requests("/token").is_empty());
    assert_eq!(other.requests("/x").len(), 6);
    for request in other.requests("").iter().chain(&registry.requests("/back")) {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
        assert!(!request.headers.contains_key("x-key"), "{request:?}");
    }

    // Nor does a token server pass them on.
    let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{address}/token\"\r\n");
    registry.set(
        manifest_path(),
        vec![Answer::Status(401, challenge, String::new())],
    );
    registry.set("/token", vec![redirect(&elsewhere)]);
    other.set(
        "/x",
        vec![Answer::Status(403, String::new(), String::new())],
    );
    let identity = Some(Auth {
        identity_token: "refresh".into(),
        ..Auth::default()
    });
    for auth in [identity, password()] {
        test.store.pull(&name(&registry), auth).await.unwrap_err();
    }
    for request in &other.requests("/x")[6..] {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
        assert!(!request.body.contains("refresh"), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_drips_is_given_up() {
    let (registry, image) = (Faulty::start().await, image());
    let blob = &image.layers[0];
    let blob_path = format!("/v2/a/b/blobs/{}", blob.digest());
    let drip = |bytes: &[u8]| Answer::Slow(bytes.to_vec(), 1, Duration::from_millis(50));
    let test = TestStore::with(None, |limits| {
        limits.no_progress = Duration::from_millis(400);
        limits.retries = 1;
    })
    .await;
    for (path, answer) in [
        (blob_path.as_str(), drip(&blob.bytes)),
        (manifest_path(), drip(&image.manifest.bytes)),
        (manifest_path(), Answer::SlowHead(Duration::from_millis(50))),
        (&blob_path, Answer::SlowHead(Duration::from_millis(50))),
    ] {
        registry.put("a/b", "t", &image);
        registry.set(path, vec![answer.clone()]);
        let name = name(&registry);
        let pull = test.store.pull(&name, None);
        let error = tokio::time::timeout(Duration::from_secs(20), pull).await;
        let error = error.expect("it goes on for ever").unwrap_err();
        assert!(matches!(error, PullError::Timeout { .. }), "{error:?}");
        assert_eq!(test.leftovers(), [""; 0]);
    }
    // A slow one that gets on is waited for, longer than for one that does not.
    registry.put("a/b", "t", &image);
    let slow = Answer::Slow(blob.bytes.clone(), 20_000, Duration::from_millis(60));
    registry.set(&blob_path, vec![slow]);
    let started = Instant::now();
    test.store.pull(&name(&registry), None).await.unwrap();
    assert!(started.elapsed() > Duration::from_millis(800));
}
