# Golden vectors of the adapter module, made with PEFT.
import json, torch, warnings
warnings.filterwarnings("ignore")
from transformers import AutoModelForCausalLM, AutoConfig
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D
base="tests/data/tiny-llama"
cases=[
 dict(r=4,lora_alpha=8,target_modules=["q_proj","v_proj"]),
 dict(r=4,lora_alpha=8,target_modules="all-linear"),
 dict(r=4,lora_alpha=8,target_modules=r".*\.layers\.0\..*(q|k)_proj"),
 dict(r=4,lora_alpha=8,target_modules="q_proj|.*down_proj"),
 dict(r=4,lora_alpha=8,target_modules=["proj","model.layers.1.mlp.up_proj"]),
 dict(r=8,lora_alpha=16,target_modules=["mlp.down_proj","o_proj"],use_rslora=True),
 dict(r=8,lora_alpha=16,target_modules=["lm_head","q_proj"]),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","k_proj"],layers_to_transform=[1]),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","k_proj"],layers_to_transform=0,layers_pattern="layers"),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","v_proj"],exclude_modules=["layers.0.self_attn.q_proj"]),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","v_proj"],exclude_modules=r".*\.1\..*"),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","v_proj","up_proj"],rank_pattern={"q_proj":2,r"model\.layers\.1\..*":32},alpha_pattern={"v_proj":5,"^model.layers.0.mlp.up_proj":64}),
 dict(r=8,lora_alpha=16,target_modules=["q_proj","v_proj"],rank_pattern={"layers.1.self_attn.v_proj":3},use_rslora=True),
]
out=[]
for c in cases:
    torch.manual_seed(0)
    m=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    cfg=LoraConfig(task_type="CAUSAL_LM",**c)
    p=get_peft_model(m,cfg)
    found={}
    for n,mod in p.base_model.model.named_modules():
        if hasattr(mod,"lora_A") and "default" in mod.lora_A:
            found[n]={"r":mod.r["default"],"alpha":mod.lora_alpha["default"],"scale":mod.scaling["default"],"out":mod.lora_B["default"].weight.shape[0],"in":mod.lora_A["default"].weight.shape[1]}
    out.append({"config":{**c,"peft_type":"LORA"},"targets":found})
json.dump(out,open("tests/data/adapter/targets.json","w"),indent=1)
m=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)); print(m.config.tie_word_embeddings,len(out),[len(o["targets"]) for o in out])
merges=[]
for dora in (False,True):
  for rs in (False,True):
    for conv in (False,True):
        torch.manual_seed(7)
        net=torch.nn.Sequential(Conv1D(5,6) if conv else torch.nn.Linear(6,5,bias=False))
        torch.nn.init.normal_(net[0].weight)
        w=net[0].weight.detach().clone()
        p=get_peft_model(net,LoraConfig(r=3,lora_alpha=7,use_dora=dora,use_rslora=rs,target_modules=["0"],fan_in_fan_out=conv))
        l=p.base_model.model[0]
        torch.nn.init.normal_(l.lora_A["default"].weight); torch.nn.init.normal_(l.lora_B["default"].weight)
        first=None
        if dora:
            first=l.lora_magnitude_vector["default"].weight.detach().clone().flatten().tolist()
            torch.nn.init.uniform_(l.lora_magnitude_vector["default"].weight,0.5,2.0)
        e=dict(dora=dora,rslora=rs,conv1d=conv,out=5,**{"in":6},r=3,alpha=7,weight=w.flatten().tolist(),a=l.lora_A["default"].weight.flatten().tolist(),b=l.lora_B["default"].weight.flatten().tolist(),
          first_magnitude=first,magnitude=l.lora_magnitude_vector["default"].weight.flatten().tolist() if dora else None)
        e["merged"]=p.merge_and_unload()[0].weight.flatten().tolist()
        merges.append(e)
json.dump(merges,open("tests/data/adapter/merges.json","w"))
