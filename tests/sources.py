"""Numbers of the book's prose that no code of a chapter prints: each with where it stands.

A number of the released config.json needs no entry, nor does one that the chapter's own code or
commands print.
"""

SOURCES = {
    "196.81": "the model card's count of parameters, in billions",
    "11": "the model card's active parameters, in billions",
    "1.702": "alpha of gpt-oss's swiglu, gpt_oss/torch/model.py",
    "3.5": "the name of Step 3.5 Flash",
    "3.1": "the name of Llama 3.1",
    "8192": "the original length of Llama 3.1: transformers, _compute_llama3_parameters",
    "0.1": "the weight of the MTP losses after stage 1: the report, section 4.1",
    "0.68": "least singular value that Muon's first form leaves of 0.01 to 1: measured",
    "1.21": "the largest of them: measured",
    "1800": "steps of the run with topics once: measured",
    "0.4": "its weight decay",
    "1.388": "its held-out bits a byte",
    "120": "steps of the two short runs with and without balancing: measured",
    "0.08": "the least load without balancing: measured",
    "3.63": "the largest load without balancing: measured",
    "0.87": "the least load with balancing: measured",
    "1.11": "the largest load with balancing: measured",
    "3.11": "the version of Python whose documentation the shipped model was trained on",
    "2.2": "e-6, worst row of a correct float32 run: measured",
    "42": "random checkpoints in which 16-bit errors were measured",
    "600": "tokens of the longest prompt in which row errors were measured",
    "1000000": "theta of full layers at 32K tokens: the report, arXiv 2602.10604, pretraining",
    "97": "percent of drafts kept: vLLM pull requests 38493 and 38494",
    "99.91": "percent of entries that differ: Megatron-Bridge pull request 5364",
    "0.75": "share of depth 2's drafts kept on MiMo, states not chained: sglang-jax pull 1256",
    "0.78": "the same of depth 3",
    "0.47": "share of depth 2's drafts kept on MiMo, states chained: sglang-jax pull request 1256",
    "0.36": "the same of depth 3",
    "0.81": "the model card's size of the MTP head, in billions",
    "196": "the model card's main layers, in billions",
    "198": "the report's table of models, with MTP layers, in billions",
    "300": "the model card's usual tokens a second, at most",
    "18.9": "the authors' decoding cost of GLM-4.7 and Kimi K2, Step 3.5 Flash being 1",
    "128815": "the released configuration_step3p5.py's default of vocab_size: the tokens in use",
}
