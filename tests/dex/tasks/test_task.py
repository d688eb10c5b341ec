"""Descriptions of downstream tasks."""

from dex.tasks.task import IGNORED, SPLITS, Layout, Task


def test_a_task_says_nothing_that_nobody_knows():
    task = Task("mine")
    assert (task.licence, task.citation, task.overlap) == ("unknown", "unknown", "")
    assert task.layout == Layout() and task.layout.state == "unknown"
    assert SPLITS == ("train", "val", "test") and IGNORED == 255
