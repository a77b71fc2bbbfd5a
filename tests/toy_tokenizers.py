"Small tokenizers made on the spot, so that tests need no download and no 93 MB wheel."
from functools import lru_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["Below is an instruction that describes a task. Write a response that appropriately completes the request.",
         "Below is an instruction that describes a task, paired with an input that provides further context.",
         "### Instruction:\nWhat is the capital of France?\n\n### Input:\n\n### Response:\nParis is the capital of France.",
         "The old mill in the valley has been visited by millions of people."] * 4

@lru_cache
def byte_level(bos=False, pad_is_eos=True):
    "Byte-level BPE in the style of GPT-2; with `bos`, in the style of OPT, which begins every text with a special token."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<pad>", "<end>"], show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos: t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<pad>",
                                   additional_special_tokens=["<end>"])

@lru_cache
def sentence_piece():
    "BPE over words with a visible space and bytes for the rest, BOS first, in the style of LLaMA."
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)], show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
