//! Images: pulled from a real registry, listed, removed, shared by pods.

use hull_proto_cri::v1::{
    ImageFsInfoRequest, ImageStatusRequest, ListImagesRequest, RemoveImageRequest,
};
use hull_tests::client::image;

use crate::harness::{BUSYBOX, Node};

#[tokio::test]
async fn an_image_is_pulled_listed_and_removed() {
    let node = Node::start().await;
    let id = node.client.pull(BUSYBOX).await.unwrap();
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(node.client.pull(BUSYBOX).await.unwrap(), id);

    let mut images = node.client.images.clone();
    let list = images.list_images(ListImagesRequest::default()).await;
    let list = list.unwrap().into_inner().images;
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].repo_tags, [BUSYBOX]);
    assert!(list[0].repo_digests[0].starts_with("registry.test/demo/busybox@sha256:"));
    assert!(list[0].size > 100_000, "{}", list[0].size);

    for name in [BUSYBOX, &id, &list[0].repo_digests[0]] {
        let request = ImageStatusRequest {
            image: Some(image(name)),
            verbose: false,
        };
        let status = images.image_status(request).await.unwrap().into_inner();
        assert_eq!(status.image.unwrap().id, id, "{name}");
    }
    let usage = images.image_fs_info(ImageFsInfoRequest {}).await.unwrap();
    let usage = usage.into_inner().image_filesystems;
    assert!(usage[0].used_bytes.unwrap().value > 100_000);

    for _ in 0..2 {
        let request = RemoveImageRequest {
            image: Some(image(BUSYBOX)),
        };
        images.remove_image(request).await.unwrap();
    }
    let request = ImageStatusRequest {
        image: Some(image(BUSYBOX)),
        verbose: false,
    };
    let status = images.image_status(request).await.unwrap().into_inner();
    assert!(status.image.is_none(), "absent is an empty answer");
    node.finish().await;
}

#[tokio::test]
async fn a_container_keeps_its_image() {
    let node = Node::start().await;
    let pod = node.pod("kept").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let request = RemoveImageRequest {
        image: Some(image(BUSYBOX)),
    };
    // Refused or deferred: either way the container must go on.
    let _ = node.client.images.clone().remove_image(request).await;
    let tree = node
        .exec(&id, "find /bin /etc /lib -type f -exec cat {} + | md5sum")
        .await;
    assert_eq!(tree.exit_code, 0);
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn what_a_layer_deleted_is_gone_and_the_rest_is_whole() {
    let node = Node::start().await;
    let pod = node.pod("tree").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let hash = node
        .exec(&id, "md5sum < /bin/busybox; ls -ld /tmp /etc/passwd")
        .await;
    let text = String::from_utf8_lossy(&hash.stdout).into_owned();
    assert_eq!(hash.exit_code, 0, "{text}");
    assert!(text.contains("drwxrwxrwt"), "{text}");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}
