"""Interventions on a dense model through a weight-sparse one: named channels, intervene(), circuits, steering."""

from typing import TYPE_CHECKING

from sparse_model.exports import lazy_names

if TYPE_CHECKING:
    from bridges.packaged import packaged_bundles
    from interventions.bases.compare import compare_bases
    from interventions.bases.comparison_config import Comparison
    from interventions.bases.result import Bases, plot_bases
    from interventions.bundle.bundle import load_dense, load_hf
    from interventions.bundle.channels import Channel, load_channels, save_channel
    from interventions.circuits.circuit import Circuit, load_circuit, make_circuit, save_circuit
    from interventions.circuits.circuit_search import find_circuit, with_controls
    from interventions.circuits.controls import validate
    from interventions.circuits.draw_effects import plot_effects
    from interventions.circuits.node_model import as_nodes
    from interventions.circuits.prune_config import PruneConfig
    from interventions.circuits.pruning import prune, reference_ablation, splits
    from interventions.circuits.task_scores import score_tasks, solved_tasks
    from interventions.editing.intervene import Intervention, intervene, intervene_vector
    from interventions.finding.by_circuit import channel_by_circuit
    from interventions.finding.by_patching import channel_by_patching
    from interventions.finding.by_steering import channel_by_steering
    from interventions.finding.channel_search import find_channel
    from interventions.finding.evidence import channel_evidence
    from interventions.looking.activations import activations, sparse_cache, top_channels
    from interventions.looking.examples import logit_lens, top_examples
    from interventions.report.page import write_report
    from interventions.sharing.packaging import save_pretrained
    from interventions.sharing.push import push_to_hub
    from interventions.steering.baseline import dense_accuracy
    from interventions.steering.experiment_config import Experiment
    from interventions.steering.result import Steering, plot_strengths
    from interventions.steering.steer import steer
    from interventions.tasks.base import Task, TaskBatch
    from interventions.tasks.catalogue import get_task, list_tasks
    from sparse_model.version import __version__

__all__ = [
    "Bases",
    "Channel",
    "Circuit",
    "Comparison",
    "Experiment",
    "Intervention",
    "PruneConfig",
    "Steering",
    "Task",
    "TaskBatch",
    "__version__",
    "activations",
    "as_nodes",
    "channel_by_circuit",
    "channel_by_patching",
    "channel_by_steering",
    "channel_evidence",
    "compare_bases",
    "dense_accuracy",
    "find_channel",
    "find_circuit",
    "get_task",
    "intervene",
    "intervene_vector",
    "list_tasks",
    "load_channels",
    "load_circuit",
    "load_dense",
    "load_hf",
    "logit_lens",
    "make_circuit",
    "packaged_bundles",
    "plot_bases",
    "plot_effects",
    "plot_strengths",
    "prune",
    "push_to_hub",
    "reference_ablation",
    "save_channel",
    "save_circuit",
    "save_pretrained",
    "score_tasks",
    "solved_tasks",
    "sparse_cache",
    "splits",
    "steer",
    "top_channels",
    "top_examples",
    "validate",
    "with_controls",
    "write_report",
]

__getattr__ = lazy_names(
    __name__,
    {
        "interventions.bases.compare": "compare_bases",
        "interventions.bases.comparison_config": "Comparison",
        "interventions.bases.result": "Bases plot_bases",
        "interventions.bundle.bundle": "load_dense load_hf",
        "interventions.bundle.channels": "Channel load_channels save_channel",
        "bridges.packaged": "packaged_bundles",
        "interventions.circuits.circuit": "Circuit load_circuit make_circuit save_circuit",
        "interventions.circuits.circuit_search": "find_circuit with_controls",
        "interventions.circuits.controls": "validate",
        "interventions.circuits.draw_effects": "plot_effects",
        "interventions.circuits.node_model": "as_nodes",
        "interventions.circuits.prune_config": "PruneConfig",
        "interventions.circuits.pruning": "prune reference_ablation splits",
        "interventions.circuits.task_scores": "score_tasks solved_tasks",
        "interventions.editing.intervene": "Intervention intervene intervene_vector",
        "interventions.finding.by_circuit": "channel_by_circuit",
        "interventions.finding.by_patching": "channel_by_patching",
        "interventions.finding.by_steering": "channel_by_steering",
        "interventions.finding.channel_search": "find_channel",
        "interventions.finding.evidence": "channel_evidence",
        "interventions.looking.activations": "activations sparse_cache top_channels",
        "interventions.looking.examples": "logit_lens top_examples",
        "interventions.report.page": "write_report",
        "interventions.sharing.packaging": "save_pretrained",
        "interventions.sharing.push": "push_to_hub",
        "interventions.steering.baseline": "dense_accuracy",
        "interventions.steering.experiment_config": "Experiment",
        "interventions.steering.result": "Steering plot_strengths",
        "interventions.steering.steer": "steer",
        "interventions.tasks.base": "Task TaskBatch",
        "interventions.tasks.catalogue": "get_task list_tasks",
    },
)


def __dir__() -> list[str]:
    return __all__
