"""Files that appear whole or not at all, and folders in which one process writes at a time."""

import contextlib
import os

from utils.settings import UserError


@contextlib.contextmanager
def new_file(path):
    """A binary file that gets its name when it is complete. UserError where the disk fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # after a power cut, either the old file is there or this one
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides a full disk
        if isinstance(cause, OSError) and not cause.filename:  # else it was another file
            raise UserError(f"{path} could not be written: {cause.strerror}") from None
        raise


@contextlib.contextmanager
def locked(folder):
    """Make a folder and lock it meanwhile; UserError where another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(f.fileno()).st_nlink == 0:  # its owner deleted it after we opened it
                raise BlockingIOError
        except BlockingIOError:
            hint = "wait for it, or use another folder"
            raise UserError(f"another process is at work in {folder}; {hint}") from None
        except (ImportError, OSError):  # Windows and some file systems have no such locks
            pass
        yield
