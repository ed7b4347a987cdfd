"""Files that appear whole or not at all, and folders in which one process writes at a time."""

import contextlib
import os

from utils.settings import UserError


@contextlib.contextmanager
def new_file(path):
    """A binary file that appears under its name when all of it is written; on an error what was there stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # else a power cut may leave neither what was there nor this
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(folder):
    """Make a folder that is removed where it is left empty; refuse one where another process is at work.

    The system drops the lock when a process dies. Without such locks (Windows) nothing is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(f.fileno()).st_nlink == 0:  # deleted by its owner after it was opened here
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it, or use another folder") from None
        except (ImportError, OSError):
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete what is open
                os.unlink(f.name)
                os.removedirs(folder)  # it and what it is in, as far as they are empty
