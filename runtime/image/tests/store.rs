//! The store against Debian's docker-registry: what is remembered, shared, kept and given back.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::fs;
use std::path::Path;

use common::certificates::{Signed, make_certificates};
use common::registry::RealRegistry;
use common::{Flavor, Packing, TestImage, TestStore, layer, noise};
use hull_image::{Auth, Image, ImageStore, PinnedImages, PullError, PullProgress, StoreError};
use tokio::sync::watch;

fn base() -> Vec<u8> {
    layer(&[("base", &noise(400_000, 1)), ("etc/os", b"hull")])
}

fn image(flavor: Flavor, packing: Packing, own: &str) -> TestImage {
    TestImage::new(
        flavor,
        &[
            (base(), packing),
            (layer(&[("own", own.as_bytes())]), packing),
        ],
    )
}

async fn get(test: &TestStore, name: &str) -> Option<Image> {
    test.store.get(name).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_forms_of_images_are_pulled() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    for (flavor, packing) in [
        (Flavor::Oci, Packing::Plain),
        (Flavor::Oci, Packing::Gzip),
        (Flavor::Oci, Packing::Zstd),
        (Flavor::Docker, Packing::Gzip),
    ] {
        let tag = format!("{flavor:?}-{packing:?}");
        let image = image(flavor, packing, &tag);
        registry.push("team/app", &tag, &image).await;
        registry
            .push_manifest("team/app", &format!("{tag}-index"), &image.index(flavor))
            .await;
        let repository = format!("{}/team/app", registry.address());
        let plain = format!("{repository}:{tag}");
        let through_index = format!("{repository}:{tag}-index");
        let id = test.store.pull(&plain, None).await.unwrap();
        assert_eq!(id.as_str(), image.id());
        assert_eq!(test.store.pull(&through_index, None).await.unwrap(), id);
        let seen = get(&test, id.as_str()).await.unwrap();
        assert_eq!(seen.repo_tags, [plain.clone(), through_index]);
        let mut digests = vec![
            format!("{repository}@{}", image.manifest.digest()),
            format!("{repository}@{}", image.index(flavor).digest()),
        ];
        digests.sort();
        assert_eq!(seen.repo_digests, digests);
        assert_eq!(seen.config.cmd, ["/bin/sh"]);
        let blobs: usize = image.layers.iter().map(|blob| blob.bytes.len()).sum();
        let rest = image.config.bytes.len() + image.manifest.bytes.len();
        assert_eq!(seen.size, (blobs + rest) as u64);
        for name in [
            &digests[0],
            &digests[1],
            &id.as_str()[7..20].to_owned(),
            &plain,
        ] {
            assert_eq!(get(&test, name).await.as_ref(), Some(&seen), "{name}");
        }
        assert_eq!(test.store.pull(&digests[0], None).await.unwrap(), id);
    }
    // One shared base and one own layer each.
    assert_eq!(test.count("layers"), 5);
    assert_eq!(test.count("images"), 4);
    assert_eq!(test.store.list().await.unwrap().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_leaves_the_old_image_without_it() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    let name = format!("{}/app:t", registry.address());
    let (old, new) = (
        image(Flavor::Oci, Packing::Gzip, "1"),
        image(Flavor::Oci, Packing::Gzip, "2"),
    );
    registry.push("app", "t", &old).await;
    test.store.pull(&name, None).await.unwrap();
    registry.push("app", "t", &new).await;
    test.store.pull(&name, None).await.unwrap();
    assert_eq!(get(&test, &name).await.unwrap().id.as_str(), new.id());
    let before = get(&test, &old.id()).await.unwrap();
    assert!(before.repo_tags.is_empty());
    assert_eq!(before.repo_digests.len(), 1);

    let test = test.reopen().await;
    assert_eq!(test.store.list().await.unwrap().len(), 2);
    test.store.remove(&old.id()).await.unwrap();
    test.store.remove(&old.id()).await.unwrap();
    assert_eq!(test.store.list().await.unwrap().len(), 1);
    assert_eq!((test.count("layers"), test.count("images")), (2, 1));
    test.store.remove(&name).await.unwrap();
    assert_eq!(test.leftovers(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_one_name_removes_all_of_the_image() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    let image = image(Flavor::Docker, Packing::Gzip, "1");
    let mut names = Vec::new();
    for tag in ["a", "b", "c"] {
        registry.push("app", tag, &image).await;
        names.push(format!("{}/app:{tag}", registry.address()));
        test.store
            .pull(&names[names.len() - 1], None)
            .await
            .unwrap();
    }
    assert_eq!(get(&test, &names[0]).await.unwrap().repo_tags, names);
    test.store.remove(&names[1]).await.unwrap();
    for name in names.iter().chain([&image.id()]) {
        assert_eq!(get(&test, name).await, None, "{name}");
        test.store.remove(name).await.unwrap();
    }
    assert_eq!(test.leftovers(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_image_is_shown_as_such_and_goes_when_told() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let repository = format!("{}/app", registry.address());
    let directory = tempfile::tempdir().unwrap();
    let mut config = common::worker::store(directory.path());
    config.pinned = PinnedImages::parse(&[format!("{repository}:keep")]).unwrap();
    let store = ImageStore::open(config).await.unwrap();
    let mut names = Vec::new();
    for tag in ["keep", "other"] {
        let image = image(Flavor::Oci, Packing::Gzip, tag);
        registry.push("app", tag, &image).await;
        names.push(format!("{repository}:{tag}"));
        store.pull(&names[names.len() - 1], None).await.unwrap();
    }
    for image in store.list().await.unwrap() {
        assert_eq!(image.pinned, image.repo_tags == [names[0].clone()]);
    }
    assert!(store.get(&names[0]).await.unwrap().unwrap().pinned);
    store.remove(&names[0]).await.unwrap();
    assert_eq!(store.get(&names[0]).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leased_image_keeps_its_disk_until_it_is_released() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    let name = format!("{}/app:t", registry.address());
    let image = image(Flavor::Oci, Packing::Zstd, "1");
    registry.push("app", "t", &image).await;
    let id = test.store.pull(&name, None).await.unwrap();
    test.store.lease(&id, "container-1").await.unwrap();
    test.store.lease(&id, "container-1").await.unwrap();
    test.store.lease(&id, "container-2").await.unwrap();
    assert_eq!(get(&test, id.as_str()).await.unwrap().leases, 2);
    let disk = test.store.disk(&id).await.unwrap();
    test.store.remove(&name).await.unwrap();
    assert_eq!(get(&test, &name).await, None);
    assert_eq!(get(&test, id.as_str()).await, None);
    assert!(test.store.list().await.unwrap().is_empty());

    let test = test.reopen().await;
    let all = test.store.list_all().await.unwrap();
    assert_eq!((all.len(), all[0].removed, all[0].leases), (1, true, 2));
    assert_eq!(test.store.disk(&id).await.unwrap(), disk);
    assert_eq!(
        test.store.lease_owners().await.unwrap(),
        ["container-1", "container-2"]
    );
    // Who has it may ask again, e.g. after a restart; nobody else can start to use it.
    test.store.lease(&id, "container-1").await.unwrap();
    let error = test.store.lease(&id, "container-3").await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error:?}");

    test.store.release("container-1").await.unwrap();
    assert_eq!(test.leftovers().len(), 3);
    // A pull brings it back without a transfer.
    let progress = watch::Sender::new(PullProgress::default());
    test.store
        .pull_watched(&name, None, &progress)
        .await
        .unwrap();
    assert_eq!(progress.borrow().bytes, 0);
    assert_eq!(progress.borrow().layers_done, 2);
    test.store.release("container-2").await.unwrap();
    test.store.release("container-2").await.unwrap();
    assert!(get(&test, &name).await.is_some());
    test.store.lease(&id, "container-4").await.unwrap();
    test.store.remove(id.as_str()).await.unwrap();
    test.store.release("container-4").await.unwrap();
    assert_eq!(test.leftovers(), [""; 0]);
    let error = test.store.disk(&id).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_gone_at_the_next_start() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    let image = image(Flavor::Oci, Packing::Gzip, "1");
    registry.push("app", "t", &image).await;
    let id = test
        .store
        .pull(&format!("{}/app:t", registry.address()), None)
        .await
        .unwrap();
    let good = test.leftovers();
    let root = test.directory.path().join("images");
    for path in [
        "tmp/.tmpAbc/data",
        &format!("layers/sha256-{}/tree", "0".repeat(64)),
        "layers/nonsense/x",
        &format!("images/sha256-{}/meta.erofs", "1".repeat(64)),
    ] {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), b"left").unwrap();
    }
    let test = test.reopen().await;
    assert_eq!(test.leftovers(), good);
    // A disk whose file is damaged is not handed out.
    let extents = test.store.disk(&id).await.unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&extents[1].path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(test.store.disk(&id).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_and_usage_are_told() {
    let Some(registry) = RealRegistry::start().await else {
        return;
    };
    let test = TestStore::open().await;
    let empty = test.store.usage().await.unwrap();
    let image = image(Flavor::Oci, Packing::Gzip, "1");
    registry.push("app", "t", &image).await;
    let progress = watch::Sender::new(PullProgress::default());
    let name = format!("{}/app:t", registry.address());
    test.store
        .pull_watched(&name, None, &progress)
        .await
        .unwrap();
    let bytes: usize = image.layers.iter().map(|blob| blob.bytes.len()).sum();
    let bytes = bytes as u64;
    let expected = PullProgress {
        layers: 2,
        layers_done: 2,
        bytes,
        bytes_done: bytes,
    };
    assert_eq!(*progress.borrow(), expected);
    let usage = test.store.usage().await.unwrap();
    // Two layers and an image: a directory each, three files per layer, one per image.
    assert_eq!(usage.inodes - empty.inodes, 10);
    assert!(usage.bytes - empty.bytes > 400_000, "{usage:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_passwords_are_real() {
    for signed in [Signed::Authority, Signed::Itself] {
        let certificate = tempfile::tempdir().unwrap();
        let more = "  tls: {certificate: DIR/cert.pem, key: DIR/key.pem}\n\
                    auth:\n  htpasswd: {realm: hull, path: DIR/htpasswd}\n";
        let started = RealRegistry::start_with(more, |directory| {
            make_certificates(directory, signed);
            fs::copy(directory.join("ca.pem"), certificate.path().join("ca.pem")).unwrap();
        });
        let Some(registry) = started.await else {
            return;
        };
        pull_with_tls(&registry, certificate.path()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_a_certificate_gets_it() {
    let config = tempfile::tempdir().unwrap();
    let directory = config.path().join("secure.example");
    fs::create_dir(&directory).unwrap();
    let more = "  tls: {certificate: DIR/cert.pem, key: DIR/key.pem, clientcas: [DIR/ca.pem]}\n";
    let started = RealRegistry::start_with(more, |from| {
        make_certificates(from, Signed::Authority);
        for file in ["ca.pem", "client.cert", "client.key", "client.pem"] {
            fs::copy(from.join(file), directory.join(file)).unwrap();
        }
    });
    let Some(registry) = started.await else {
        return;
    };
    let image = image(Flavor::Oci, Packing::Gzip, "1");
    registry.push("app", "t", &image).await;
    for (client, good) in [
        ("client = [[\"client.cert\", \"client.key\"]]", true),
        ("client = \"client.pem\"", true),
        ("", false),
    ] {
        for trust in ["ca = \"ca.pem\"", "skip_verify = true"] {
            let server = registry.address();
            let text = format!("server = \"https://{server}\"\n{trust}\n{client}\n");
            fs::write(directory.join("hosts.toml"), text).unwrap();
            let test = TestStore::with(Some(config.path().into()), |limits| limits.retries = 0);
            let test = test.await;
            let pulled = test.store.pull("secure.example/app:t", None).await;
            match pulled {
                Ok(id) if good => assert_eq!(id.as_str(), image.id()),
                Err(PullError::RegistryUnavailable { message, .. }) if !good => {
                    assert!(message.to_lowercase().contains("certificate"), "{message}");
                }
                other => panic!("{trust} {client}: {other:?}"),
            }
        }
    }
}

async fn pull_with_tls(registry: &RealRegistry, certificate: &Path) {
    let image = image(Flavor::Oci, Packing::Gzip, "1");
    registry.push("app", "t", &image).await;
    let auth = Auth {
        username: "user".into(),
        password: "secret".into(),
        ..Auth::default()
    };
    let pull = async |text: &str, auth: Option<Auth>| {
        let config = tempfile::tempdir().unwrap();
        let directory = config.path().join("secure.example");
        fs::create_dir(&directory).unwrap();
        fs::copy(certificate.join("ca.pem"), directory.join("ca.pem")).unwrap();
        let text = text.replace("HOST", &registry.address());
        fs::write(directory.join("hosts.toml"), text).unwrap();
        let test = TestStore::with(Some(config.path().into()), |limits| limits.retries = 0).await;
        test.store.pull("secure.example/app:t", auth).await
    };
    let trusted = "server = \"https://HOST\"\nca = \"ca.pem\"";
    let id = pull(trusted, Some(auth.clone())).await.unwrap();
    assert_eq!(id.as_str(), image.id());
    let unverified = "server = \"https://HOST\"\nskip_verify = true";
    pull(unverified, Some(auth.clone())).await.unwrap();
    let error = pull(trusted, None).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");
    let wrong = Auth {
        password: "wrong".into(),
        ..auth.clone()
    };
    let error = pull(trusted, Some(wrong)).await.unwrap_err();
    assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");
    // Neither an unknown authority nor a certificate for another name is let through.
    for text in [
        "server = \"https://HOST\"",
        &trusted.replace("HOST", "localhost:PORT"),
    ] {
        let text = text.replace("PORT", &registry.port.to_string());
        let error = pull(&text, Some(auth.clone())).await.unwrap_err();
        assert!(
            matches!(&error, PullError::Untrusted { reason, .. } if reason.contains("authority") || reason.contains("name")),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_expired_is_not_trusted_and_told() {
    for signed in [Signed::AuthorityLongAgo, Signed::ItselfLongAgo] {
        let config = tempfile::tempdir().unwrap();
        let directory = config.path().join("secure.example");
        fs::create_dir(&directory).unwrap();
        let more = "  tls: {certificate: DIR/cert.pem, key: DIR/key.pem}\n";
        let started = RealRegistry::start_with(more, |from| {
            make_certificates(from, signed);
            fs::copy(from.join("ca.pem"), directory.join("ca.pem")).unwrap();
        });
        let Some(registry) = started.await else {
            return;
        };
        let text = format!(
            "server = \"https://{}\"\nca = \"ca.pem\"\n",
            registry.address()
        );
        fs::write(directory.join("hosts.toml"), text).unwrap();
        let test = TestStore::with(Some(config.path().into()), |_| {}).await;
        let error = test.store.pull("secure.example/app:t", None).await;
        let error = error.unwrap_err();
        assert!(matches!(error, PullError::Untrusted { .. }), "{error:?}");
        assert!(error.to_string().contains("expired 1 day ago"), "{error}");
    }
}
