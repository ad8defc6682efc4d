"""The runner of first tasks: it runs what pages mark, and notices what fails."""

import subprocess
from pathlib import Path

import pytest

from tests.docs import walk

PAGE = """
<!-- walk: count
echo 3 > number
-->

Text, and a block that is not marked:

```bash
exit 1
```

<!-- walk: count; 1000 -> 4 -->

```bash
mor --version && python -c "print(1000)" >> number
```

<!-- walk: count -->
```python
numbers = [int(line) for line in open("number")]
```

<!-- walk: count -->
```python
assert numbers == [3, 4], numbers
```

<!-- walk: fail -->
```bash
echo before
false
echo after
```
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").write_text("no")
    (folder / "integrations").symlink_to(walk.ROOT / "integrations")
    return folder


def page_of(folder: Path, text: str = PAGE) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def test_a_task_runs_its_blocks_in_turn_in_a_copy_of_the_checkout(tmp_path, checkout, monkeypatch):
    environment_of = walk.environment_of
    monkeypatch.setattr(walk, "environment_of", lambda _, place: environment_of(walk.ROOT, place))
    count, fail = walk.tasks_of(page_of(tmp_path))
    assert (count.name, fail.name) == ("count", "fail")
    assert walk.walk(count, checkout) is None
    assert not (checkout / "number").exists()
    problem = walk.walk(fail, checkout)
    assert problem is not None
    assert problem.startswith("exit status 1 of:")
    assert problem.endswith("\nbefore")


def test_a_copy_has_the_files_that_git_would_have(tmp_path, checkout):
    (checkout / "new").write_text("yes")
    walk.copy(checkout, tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"new", ".gitignore"} <= copied
    assert "ignored" not in copied


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- walk: task -->\n\ntext\n", "has no code block below it"),
        ("<!-- walk: task -->\n```yaml\na: 1\n```\n", "has a block of yaml"),
        ("<!-- walk: task; a -> b -->\n```bash\nc\n```\n", "no 'a' in a block of 'task'"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        walk.tasks_of(page_of(tmp_path, text))


def test_the_marks_of_all_pages_can_be_followed():
    tasks = walk.all_tasks()
    assert len(tasks) >= 4
    assert all(task.blocks for task in tasks)
