"""Surgery-R1 in JAX: Qwen-VL models learn to answer and to locate in robotic surgery, by SFT and by GRPO.

Reading order; a module imports only modules before it. README.md says of each what it is.

    labels, answers, words   errors places files folders config options vocabulary labels archives codec
                             answer frames prepared recordfile records location floors images likeness leaks
                             spaces
                             surgery_vqla reasoning traces claims tracecheck labellist teacher build
    drawn frames             shapes scene tissue cues drawing synth
    frames to arrays         appearance augment chat tiny grid batch examples lengths check plan stream
                             pipeline
    model                    sharding layers attention flash backends vision vision_qwen3 experts decoder model
    families                 weights family qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe families sizes lora
    numbers                  boxes rewards metrics grade scoring advantages objectives sampling
                             flops
    files and state          heap tensors placement hf peft fresh optim packed modelcard sums saves checkpoint
                             log speed
    programs                 launchers hosts evaluate conversations run milestones sft grpo hlo programs
    for people               pictures sheet charts cards report data_page memory doctor survey ask demo
                             arguments handlers cli

The name of an array ends in its axes, `box_BJ4`: one letter each, a digit is literal.

    B  frames of a batch           W  attention windows         D  width of the model
    P  tokens of a prefix          S  patch slots of a window   N  query heads
    Q  questions of a frame        C  values of a patch         K  key and value heads
    G  samples of a question       E  width of the tower        H  width of a head
    J  lanes of a frame, Q * G     M  merged image units        F  width of an MLP
    T  tokens of a lane            U  slots of a lane's cache   V  vocabulary
    L  scored tokens of a frame    R  reward terms              X  free, said where it is used
"""

__version__ = "0.1.0"
