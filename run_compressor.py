"""Stage 1, train the field-level compressor.

python run_compressor.py --lmax 200          here
modal run run_compressor.py --lmax 200       on a Modal GPU, same options
"""

from common.command import Command
from compress.config import CompressorConfig
from compress.result import CompressorResult


def report(result: CompressorResult) -> None:
    """What the user waited for."""
    nll = "" if result.val_nll is None else f"NLL {result.val_nll:.4f} nats (training {result.train_nll:.4f}), "
    print(
        f"best epoch {result.best_epoch} of {result.epochs}: validation {nll}MSE {result.val_mse:.4f} "
        f"(training {result.train_mse:.4f}, test {result.test_mse:.4f}), {result.elapsed_s:.0f} s\n"
        f"pictures  {result.folder}/loss_curves.png\n"
        f"          {result.folder}/predicted_vs_true.png\n"
        f"next      python run_npe.py --ckpt {result.folder}/best.ckpt"
    )


COMMAND = Command("compressor", CompressorConfig, "compress.stage.run_compressor", report)
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
