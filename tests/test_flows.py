import pytest

from vdtrain.flows import Flow, active_groups, all_flows, by_output


def test_name_and_parse_are_inverse() -> None:
    for flow in all_flows(["image", "text", "sound"]):
        assert Flow.parse(flow.name) == flow


def test_text_to_image_generates_images_from_text() -> None:
    flow = Flow.parse("text-to-image")
    assert (flow.output, flow.context) == ("image", "text")
    assert flow.groups == ("global", "data.image", "context.text")


@pytest.mark.parametrize("name", ["image", "image-to-", "-to-text", "a-to-b-to-c"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="CONTEXT-to-OUTPUT"):
        Flow.parse(name)


def test_three_modalities_have_nine_flows_and_three_sets_of_layers() -> None:
    flows = all_flows(["image", "text", "sound"])
    assert len(flows) == 9
    assert len(active_groups(flows)) == 7
    assert {output: len(own) for output, own in by_output(flows).items()} == {"image": 3, "text": 3, "sound": 3}
