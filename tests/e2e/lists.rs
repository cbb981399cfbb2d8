//! Lists as streams: the same as the lists at once.

use std::collections::BTreeMap;

use hull_proto_cri::v1::{
    ContainerFilter, ContainerStatsFilter, Image, ListContainerStatsRequest, ListContainersRequest,
    ListImagesRequest, ListPodSandboxRequest, ListPodSandboxStatsRequest, PodSandboxFilter,
    PodSandboxStatsFilter, StreamContainerStatsRequest, StreamContainersRequest,
    StreamImagesRequest, StreamPodSandboxMetricsRequest, StreamPodSandboxStatsRequest,
    StreamPodSandboxesRequest,
};

use crate::harness::Node;

/// Reads a stream to its end; no batch may be empty.
macro_rules! streamed {
    ($call:expr, $field:ident) => {{
        let mut stream = $call.await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(batch) = stream.message().await.unwrap() {
            assert!(!batch.$field.is_empty());
            all.extend(batch.$field);
        }
        all
    }};
}

#[tokio::test]
async fn streams_have_what_lists_have_under_the_same_filters() {
    let node = Node::start().await;
    let mut pods = Vec::new();
    let mut containers = Vec::new();
    node.client.pull(crate::harness::BUSYBOX).await.unwrap();
    for name in ["one", "two"] {
        let labels = BTreeMap::from([
            ("app".to_owned(), name.to_owned()),
            ("tier".to_owned(), "test".to_owned()),
        ]);
        let mut config = node.sandbox(name);
        config.labels = labels.clone();
        let pod = node.run_sandbox(config).await.unwrap();
        let mut config = node.script(name, "sleep 1000");
        config.labels = labels;
        let id = node.create(&pod, config).await.unwrap();
        node.start_container(&id).await.unwrap();
        containers.push(id);
        pods.push(pod);
    }
    let (mut r, mut i) = (node.client.runtime.clone(), node.client.images.clone());
    let tier = |app: Option<&str>| {
        let app = app.map(|app| ("app".to_owned(), app.to_owned()));
        let tier = ("tier".to_owned(), "test".to_owned());
        app.into_iter().chain([tier]).collect::<BTreeMap<_, _>>()
    };
    // All, two of them by a label, one by both, one by its shortened id, none.
    let one = pods[0].id[..12].to_owned();
    for (id, labels, expected) in [
        (String::new(), BTreeMap::new(), 2),
        (String::new(), tier(None), 2),
        (String::new(), tier(Some("two")), 1),
        (one.clone(), tier(None), 1),
        (one.clone(), tier(Some("two")), 0),
    ] {
        let filter = Some(PodSandboxFilter {
            id: id.clone(),
            label_selector: labels.clone(),
            ..Default::default()
        });
        let list = ListPodSandboxRequest {
            filter: filter.clone(),
        };
        let list = r.list_pod_sandbox(list).await.unwrap().into_inner().items;
        assert_eq!(list.len(), expected, "{filter:?}");
        let stream = StreamPodSandboxesRequest { filter };
        assert_eq!(
            streamed!(r.stream_pod_sandboxes(stream), pod_sandboxes),
            list
        );

        let filter = Some(PodSandboxStatsFilter {
            id: id.clone(),
            label_selector: labels.clone(),
        });
        let list = ListPodSandboxStatsRequest {
            filter: filter.clone(),
        };
        let list = r
            .list_pod_sandbox_stats(list)
            .await
            .unwrap()
            .into_inner()
            .stats;
        let stream = StreamPodSandboxStatsRequest { filter };
        let stream = streamed!(r.stream_pod_sandbox_stats(stream), pod_sandbox_stats);
        let names = |all: Vec<hull_proto_cri::v1::PodSandboxStats>| {
            all.into_iter()
                .map(|s| s.attributes.unwrap())
                .collect::<Vec<_>>()
        };
        let list = names(list);
        assert_eq!(list.len(), expected);
        assert_eq!(names(stream), list);

        let filter = Some(ContainerFilter {
            pod_sandbox_id: id.clone(),
            label_selector: labels.clone(),
            ..Default::default()
        });
        let list = ListContainersRequest {
            filter: filter.clone(),
        };
        let list = r
            .list_containers(list)
            .await
            .unwrap()
            .into_inner()
            .containers;
        assert_eq!(list.len(), expected);
        let stream = StreamContainersRequest { filter };
        assert_eq!(streamed!(r.stream_containers(stream), containers), list);

        let filter = Some(ContainerStatsFilter {
            pod_sandbox_id: id,
            label_selector: labels,
            ..Default::default()
        });
        let list = ListContainerStatsRequest {
            filter: filter.clone(),
        };
        let list = r
            .list_container_stats(list)
            .await
            .unwrap()
            .into_inner()
            .stats;
        let stream = StreamContainerStatsRequest { filter };
        let stream = streamed!(r.stream_container_stats(stream), container_stats);
        let names = |all: Vec<hull_proto_cri::v1::ContainerStats>| {
            all.into_iter()
                .map(|s| s.attributes.unwrap())
                .collect::<Vec<_>>()
        };
        let list = names(list);
        assert_eq!(list.len(), expected);
        assert_eq!(names(stream), list);
    }
    // One container by its shortened id.
    let filter = ContainerStatsFilter {
        id: containers[1][..10].to_owned(),
        ..Default::default()
    };
    let request = ListContainerStatsRequest {
        filter: Some(filter),
    };
    let stats = r
        .list_container_stats(request)
        .await
        .unwrap()
        .into_inner()
        .stats;
    assert_eq!(stats.len(), 1);
    assert_eq!(stats[0].attributes.as_ref().unwrap().id, containers[1]);

    let request = StreamPodSandboxMetricsRequest {};
    let metrics = streamed!(r.stream_pod_sandbox_metrics(request), pod_sandbox_metrics);
    assert_eq!(metrics.len(), 2);
    let list = i.list_images(ListImagesRequest::default()).await.unwrap();
    let list: Vec<Image> = list.into_inner().images;
    assert!(!list.is_empty());
    let request = StreamImagesRequest::default();
    assert_eq!(streamed!(i.stream_images(request), images), list);

    for pod in &pods {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}
