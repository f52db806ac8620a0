# The papers' tables from the domains' names: text, speech, adapters, fine-tuned models, test sets, word error rates.
# Stopped at any moment it goes on where it was: what is whole is a file, and what is not is not there.
#
#   make tables                   everything; hours on two cores
#   make tables EVAL=DIR          judged on DIR/{music,weather,sports,general}.txt beside the sentences of this repository
#
# Nothing that is judged on was trained on: other sentences, other voices, and for flite's slt another speaker too.

T := build/tables
BASE ?= benchmarks/demo/base
MAIN := music weather sports
MORE := cooking travel news shopping health navigation smart_home
LAST := stage-$(words $(MAIN))-$(lastword $(MAIN))
JUDGED := $(MAIN) general
JUDGED_own := held-out
SENTENCES := benchmarks/sentences
EVAL ?=
COUNT ?= 2000

SYNTH := $(BIN)/das-synth
TRAIN := OMP_NUM_THREADS=1 $(BIN)/das-train
TINY := --recipe tiny --precision bfloat16 --threads 1 --no-progress --cache $(T)/features
LORA := $(TINY) --epochs 4
FULL := $(TINY) --epochs 2 --save-dtype float16
JUDGING := --wake-word olly --wake-word "hey olly" --threads 2
WER := $(BIN)/das-bench wer $(JUDGING)

# The voices that no training hears; see training/base/voices.py.
UNHEARD := --voice en-us+linda --voice en-us+f5 --voice en-us+m7 --voice en-us+klatt3 --voice en-us+steph3
DEV_VOICES := --voice en-us+f2 --voice en-us+m3 --voice en-gb+f4 --voice en-us+klatt2 --voice en-us+Andy

.PHONY: tables adapters blora
.SECONDARY:
# What the commands write appears whole: a stopped run must not take it for half-made.
.PRECIOUS: $(T)/speech/%/metadata.jsonl $(T)/adapters/%/adapter_config.json $(T)/full/%/config.json \
	$(T)/full-encoder/%/config.json $(T)/blora/beta-%/$(LAST)/adapter_config.json \
	$(T)/multi-lora/adapter_config.json $(T)/multi-full/config.json $(T)/bundle/manifest.json $(T)/bundle-ten/manifest.json

tables: $(T)/tables.md

blora: $(T)/forgetting.md

adapters: $(foreach name,$(MAIN) $(MORE),$(T)/adapters/$(name)/adapter_config.json)

# ---- training data: one speaker per domain, as in the paper ----

EXCLUDE := $(wildcard $(SENTENCES)/*.txt $(SENTENCES)/dev/*.txt $(EVAL:%=%/*.txt))

$(T)/text/%.jsonl: | $(STAMP)
	mkdir -p $(@D)
	$(SYNTH) text $* --count $(COUNT) --seed 1 $(foreach file,$(EXCLUDE),--exclude $(file)) --output $@ --quiet

$(T)/speech/%/metadata.jsonl: $(T)/text/%.jsonl
	mkdir -p $(@D)
	$(SYNTH) speech $< --engine flite --voice rms --max-seconds 7.9 --output $(@D) --quiet

# ---- adapters and fine-tuned models ----

$(T)/adapters/%/adapter_config.json: $(T)/speech/%/metadata.jsonl
	mkdir -p $(T)/adapters
	$(TRAIN) lora --base $(BASE) --data $(<D) --output $(@D) $(LORA)

$(T)/multi-lora/adapter_config.json: $(foreach name,$(MAIN),$(T)/speech/$(name)/metadata.jsonl)
	$(TRAIN) lora --base $(BASE) $(foreach file,$^,--data $(dir $(file))) --multi --output $(@D) $(LORA)

$(T)/full/%/config.json: $(T)/speech/%/metadata.jsonl
	mkdir -p $(T)/full
	$(TRAIN) full --base $(BASE) --data $(<D) --components decoder --output $(@D) $(FULL)

$(T)/full-encoder/%/config.json: $(T)/speech/%/metadata.jsonl
	mkdir -p $(T)/full-encoder
	$(TRAIN) full --base $(BASE) --data $(<D) --components encoder-decoder --output $(@D) $(FULL)

$(T)/multi-full/config.json: $(foreach name,$(MAIN),$(T)/speech/$(name)/metadata.jsonl)
	$(TRAIN) full --base $(BASE) $(foreach file,$^,--data $(dir $(file))) --multi --output $(@D) $(FULL)

# ---- bundles ----

$(T)/bundle/manifest.json: $(foreach name,$(MAIN),$(T)/adapters/$(name)/adapter_config.json)
	$(BIN)/das-export onnx --base $(BASE) $(foreach name,$(MAIN),--adapter $(name)=$(T)/adapters/$(name)) --output $(@D) --force

$(T)/bundle-ten/manifest.json: $(foreach name,$(MAIN) $(MORE),$(T)/adapters/$(name)/adapter_config.json)
	$(BIN)/das-export onnx --base $(BASE) $(foreach name,$(MAIN) $(MORE),--adapter $(name)=$(T)/adapters/$(name)) \
		--output $(@D) --force

# ---- test sets: $(T)/sets/<sentences>/<voice>/<domain> ----

spoken = $(SYNTH) speech $< --domain $(notdir $(@D)) --max-seconds 7.9 --seed 2 --output $(@D) --quiet

$(T)/sets/own/espeak/%/metadata.jsonl: $(SENTENCES)/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine espeak-ng $(UNHEARD)
$(T)/sets/own/slt/%/metadata.jsonl: $(SENTENCES)/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine flite --voice slt
$(T)/sets/dev/espeak/%/metadata.jsonl: $(SENTENCES)/dev/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine espeak-ng $(DEV_VOICES)
$(T)/sets/dev/awb/%/metadata.jsonl: $(SENTENCES)/dev/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine flite --voice awb
ifneq ($(EVAL),)
$(T)/sets/eval/espeak/%/metadata.jsonl: $(EVAL)/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine espeak-ng $(UNHEARD)
$(T)/sets/eval/slt/%/metadata.jsonl: $(EVAL)/%.txt | $(STAMP)
	mkdir -p $(@D) && $(spoken) --engine flite --voice slt
endif

# ---- judged ----

MODELS := $(T)/multi-lora/adapter_config.json $(T)/multi-full/config.json \
	$(foreach kind,full full-encoder,$(foreach name,$(MAIN),$(T)/$(kind)/$(name)/config.json))
# Quick tables, without the fully fine-tuned models: make tables SYSTEMS=rules
SYSTEMS := all
SYSTEM_FILES := $(if $(filter all,$(SYSTEMS)),$(MODELS))
SYSTEM_LIST := $(if $(filter all,$(SYSTEMS)),--systems benchmarks/tables.yaml,--system all)

KINDS := own/espeak own/slt $(if $(EVAL),eval/espeak eval/slt)
REPORTS := $(foreach kind,$(KINDS),$(T)/wer-$(subst /,-,$(kind)).json)

sets = $(JUDGED) $(JUDGED_$(firstword $(subst /, ,$(1))))

define judged
$(T)/wer-$(subst /,-,$(1)).json: $(T)/bundle/manifest.json $(foreach name,$(call sets,$(1)),$(T)/sets/$(1)/$(name)/metadata.jsonl) $(SYSTEM_FILES)
	$(WER) --bundle $(T)/bundle $(foreach name,$(call sets,$(1)),--test $(name)=$(T)/sets/$(1)/$(name)) $(SYSTEM_LIST) \
		--output $$@ --markdown $$(@:.json=.md) --figure $$(@:.json=.png)
endef
$(foreach kind,own/espeak own/slt eval/espeak eval/slt,$(eval $(call judged,$(kind))))

# The joint rule and its settings, chosen on sentences and voices that nothing is judged on.
$(T)/tune.json: $(T)/bundle/manifest.json $(foreach voice,espeak awb,$(foreach name,$(JUDGED),$(T)/sets/dev/$(voice)/$(name)/metadata.jsonl))
	$(BIN)/das-bench tune --bundle $(T)/bundle $(JUDGING) --taus 0.025,0.1 \
		$(foreach voice,espeak awb,$(foreach name,$(JUDGED),--test $(name)-$(voice)=$(T)/sets/dev/$(voice)/$(name))) \
		--retain general-espeak --retain general-awb --output $@ --figure $(@:.json=.png) >$(@:.json=.md)

$(T)/tables.md: $(REPORTS) $(T)/forgetting.md $(T)/tune.json
	$(BIN)/das-bench tables $(foreach kind,$(KINDS),--report $(subst /,-,$(kind))=$(T)/wer-$(subst /,-,$(kind)).json) --output $@
	cat $(T)/forgetting.md $(T)/tune.md >>$@

# ---- BLoRA: the domains one after the other, with several weights of the KL term ----

BETAS := 0.03 0.1 0.15 0.3
CHAINS := lora $(BETAS:%=beta-%)
FEW := 1000
CHAIN := $(foreach name,$(MAIN),$(name)=$(T)/speech/$(name)/few.jsonl)
# Long enough for the prior to bring what is not needed from its initial +-0.07 to zero.
BLORA := $(TINY) --epochs 6 --lr 1e-3

$(T)/speech/%/few.jsonl: $(T)/speech/%/metadata.jsonl
	head -n $(FEW) $< >$@

$(T)/blora/lora/$(LAST)/adapter_config.json: $(foreach name,$(MAIN),$(T)/speech/$(name)/few.jsonl)
	$(TRAIN) blora --base $(BASE) --method lora $(BLORA) --output $(T)/blora/lora --sequence $(CHAIN)

$(T)/blora/beta-%/$(LAST)/adapter_config.json: $(foreach name,$(MAIN),$(T)/speech/$(name)/few.jsonl)
	$(TRAIN) blora --base $(BASE) --beta $* $(BLORA) --output $(T)/blora/beta-$* --sequence $(CHAIN)

CHAIN_FILES := $(foreach name,$(CHAINS),$(T)/blora/$(name)/$(LAST)/adapter_config.json)

# Beta is chosen on dev, and judged on the other sets.
CHAIN_KINDS := dev/espeak $(filter %/espeak,$(KINDS))

define chained
$(T)/wer-blora-$(subst /,-,$(1)).json: $(T)/bundle/manifest.json $(foreach name,$(JUDGED),$(T)/sets/$(1)/$(name)/metadata.jsonl) $(CHAIN_FILES)
	$(WER) --bundle $(T)/bundle $(foreach name,$(JUDGED),--test $(name)=$(T)/sets/$(1)/$(name)) \
		--system base $(foreach name,$(CHAINS),--system $(name)=$(T)/blora/$(name)/$(LAST)) --output $$@ --markdown $$(@:.json=.md)
$(T)/forgetting-$(subst /,-,$(1)).md: $(T)/wer-blora-$(subst /,-,$(1)).json
	$(BIN)/das-bench forgetting $$< $(foreach name,$(CHAINS),--adapter $(name)=$(T)/blora/$(name)/$(LAST)) \
		$(foreach name,$(MAIN),--learned $(name)) --retained general --title "Forgetting, $(subst /,-,$(1))" --output $$@
endef
$(foreach kind,dev/espeak own/espeak own/slt eval/espeak eval/slt,$(eval $(call chained,$(kind))))

$(T)/forgetting.md: $(foreach kind,$(CHAIN_KINDS),$(T)/forgetting-$(subst /,-,$(kind)).md)
	cat $^ >$@
