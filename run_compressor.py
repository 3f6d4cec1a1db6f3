"""Stage 1, train the field-level compressor.

python run_compressor.py --lmax 200          here
modal run run_compressor.py --lmax 200       on a Modal GPU, same options
"""

from __future__ import annotations

from typing import Any

from common import remote
from common.errors import exit_on_user_error
from common.options import parse_args, with_signature_of
from compress.config import CompressorConfig


@exit_on_user_error
def main() -> None:
    """Parse, train, print."""
    config = parse_args(CompressorConfig)
    from compress.train import train_compressor  # after parsing: --help and a bad value need no torch

    report(train_compressor(config))


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    print(
        f"best epoch {result['best_epoch']} of {result['epochs']}: validation MSE {result['val_mse']:.4f} "
        f"(training {result['train_mse']:.4f}, test {result['test_mse']:.4f}), {result['elapsed_s']:.0f} s\n"
        f"pictures  {result['folder']}/loss_curves.png\n"
        f"          {result['folder']}/predicted_vs_true.png\n"
        f"next      python run_npe.py --ckpt {result['folder']}/best.ckpt"
    )


if remote.modal is not None:
    app = remote.modal.App("kappa-fom-compressor")

    @app.function(**remote.GPU_FUNCTION)
    def compressor_in_container(options: dict[str, Any]) -> dict[str, Any]:
        """Stage 1 in a container with a GPU."""
        from compress.train import train_compressor

        return remote.in_container(train_compressor, CompressorConfig, options)

    @app.local_entrypoint()
    @exit_on_user_error
    @with_signature_of(CompressorConfig)
    def modal_main(**options: Any) -> None:
        """Stage 1 on Modal."""
        CompressorConfig(**options)  # a senseless value is refused here, before anything is sent
        report(remote.out_of_container(compressor_in_container.spawn(options).get()))


if __name__ == "__main__":
    main()
