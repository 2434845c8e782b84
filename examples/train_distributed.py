"""Train an embedding on MNIST or on your own images, in one process or many.

    torchrun --nproc-per-node=2 examples/train_distributed.py  # MNIST, a minute on a CPU
    torchrun --nproc-per-node=8 examples/train_distributed.py --images photos --backbone resnet18 --epochs 30

`photos/train` and `photos/val` hold a folder of images for each class. The same command, started again, resumes where
it stopped; other settings, such as --epochs or --lr, are a new run: give it another --checkpoint.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules lie beside this folder

from checkpoints import Checkpoint
from datasets import BalancedBatchSampler
from demo_data import load_mnist
from evaluation import evaluate_embeddings
from losses import BatchAllTripletLoss, GlobalBatchLoss
from metrics import EmbeddingMetric
from networks import EmbeddingNet
from trainer import fit


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with train and val; MNIST where there is none")
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"), help="where MNIST lies")
    parser.add_argument(
        "--backbone", default="resnet18", help="a classifier of torchvision that ends in a Linear layer"
    )
    parser.add_argument("--weights", default="DEFAULT", help="of the backbone; none for random ones")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10, help="classes in the batch of a process")
    parser.add_argument("--samples", type=int, default=12, help="images of each class")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each that trains")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/distributed.pt"))
    return parser.parse_args()


def images_of(folder, is_training):
    """An ImageFolder, its images cut to 224 x 224 and normalised as the backbones of torchvision expect."""
    from torchvision import datasets, transforms

    cut = [transforms.RandomResizedCrop(224, scale=(0.5, 1)), transforms.RandomHorizontalFlip()]
    if not is_training:
        cut = [transforms.Resize(256), transforms.CenterCrop(224)]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return datasets.ImageFolder(folder, transforms.Compose([*cut, transforms.ToTensor(), normalize]))


def backbone(name, weights, embedding_dim):
    """A classifier of torchvision, its last layer replaced by one of `embedding_dim` outputs."""
    from torchvision.models import get_model

    model = get_model(name, weights=None if weights == "none" else weights)
    layers = [key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if layers:
        parent, _, last = layers[-1].rpartition(".")
        width = model.get_submodule(layers[-1]).in_features
        setattr(model.get_submodule(parent), last, nn.Linear(width, embedding_dim))
    try:  # on the meta device, which computes shapes alone
        shape = copy.deepcopy(model).to("meta")(torch.empty(2, 3, 224, 224, device="meta")).shape
    except Exception as error:
        raise SystemExit(f"--backbone {name} does not turn a batch of images into one tensor: {error}") from error
    if shape != (2, embedding_dim):
        raise SystemExit(f"--backbone {name} does not end in a Linear layer: its output is {tuple(shape)}")
    return model


def main():
    args = parse_arguments()
    is_gpu = torch.cuda.is_available()
    if "RANK" in os.environ:  # set by torchrun
        distributed.init_process_group("nccl" if is_gpu else "gloo")
    rank, n_processes = (distributed.get_rank(), distributed.get_world_size()) if "RANK" in os.environ else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)

    if args.images is None:
        train, val = load_mnist(args.data_root, train=True), load_mnist(args.data_root, train=False)
        model = EmbeddingNet(args.embedding_dim)
    else:
        train, val = images_of(args.images / "train", True), images_of(args.images / "val", False)
        model = backbone(args.backbone, args.weights, args.embedding_dim)
    batches = BalancedBatchSampler(train.targets, args.classes, args.samples, num_replicas=n_processes, rank=rank)
    in_order = DistributedSampler(val, n_processes, rank, shuffle=False)
    train_loader = DataLoader(train, batch_sampler=batches, num_workers=args.workers, pin_memory=is_gpu)
    val_loader = DataLoader(val, batch_size=200, sampler=in_order, num_workers=args.workers, pin_memory=is_gpu)

    model = model.to(device, memory_format=torch.channels_last)  # as the gradients of convolutions come
    if n_processes > 1:
        if is_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(model)
    torch.manual_seed(rank)  # dropout and augmentation differ between processes
    loss_fn = GlobalBatchLoss(BatchAllTripletLoss(margin=0.5, squared=False))
    optimizer = AdamW(model.parameters(), lr=args.lr)
    scheduler = CosineAnnealingLR(optimizer, args.epochs)
    metrics = [EmbeddingMetric(evaluate_embeddings, keys=["recall@1", "map@r"])]
    keep = Checkpoint(args.checkpoint, best="val_map@r", mode="max")
    fit(
        train_loader,
        val_loader,
        model,
        loss_fn,
        optimizer,
        scheduler,
        args.epochs,
        device,
        50,
        metrics,
        checkpoint=keep,
    )
    if "RANK" in os.environ:
        distributed.barrier()  # none leaves while another still waits for it
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
