from typing import Any


class _Applier:
    available = True

    def __call__(self, op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = _Applier()
