"""The papers of the built-in methods, for whoever cites a network that was trained with one."""

XMIXUP = """\
@article{li2020xmixup,
  title   = {XMixup: Efficient Transfer Learning with Auxiliary Samples by Cross-domain Mixup},
  author  = {Li, Xingjian and Xiong, Haoyi and An, Haozhe and Xu, Chengzhong and Dou, Dejing},
  journal = {arXiv preprint arXiv:2007.10252},
  year    = {2020}
}"""

# Authors, title, where it appeared; as in the docstring of the method's file.
PAPERS = {
    'finetune': (
        'Donahue et al.',
        'DeCAF: A Deep Convolutional Activation Feature for Generic Visual Recognition',
        'ICML 2014',
    ),
    'l2sp': (
        'Li, Grandvalet, Davoine',
        'Explicit Inductive Bias for Transfer Learning with Convolutional Networks',
        'ICML 2018',
    ),
    'delta': (
        'Li, Xiong, Wang, Rao, Liu, Huan',
        'DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks',
        'ICLR 2019',
    ),
    'fsp': (
        'Yim, Joo, Bae, Kim',
        'A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer '
        'Learning',
        'CVPR 2017',
    ),
    'bss': (
        'Chen, Wang, Fu, Long, Wang',
        'Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe '
        'Transfer Learning',
        'NeurIPS 2019',
    ),
    'dtnh': (
        'Wan, Xiong, Li, Zhu, Huan',
        'Towards Making Deep Transfer Learning Never Hurt',
        'ICDM 2019',
    ),
    'seqtrain': (
        'Cui, Song, Sun, Howard, Belongie',
        'Large Scale Fine-Grained Categorization and Domain-Specific Transfer Learning',
        'CVPR 2018',
    ),
    'cotrain': (
        'Ge & Yu',
        'Borrowing Treasures from the Wealthy: Deep Transfer Learning through Selective Joint '
        'Fine-Tuning',
        'CVPR 2017',
    ),
    'xmixup': (
        'Li, Xiong, An, Xu, Dou',
        'XMixup: Efficient Transfer Learning with Auxiliary Samples by Cross-domain Mixup',
        'arXiv 2007.10252',
    ),
    'mixup': (
        'Zhang, Cisse, Dauphin, Lopez-Paz',
        'mixup: Beyond Empirical Risk Minimization',
        'ICLR 2018',
    ),
    'cutmix': (
        'Yun, Han, Oh, Chun, Choe, Yoo',
        'CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features',
        'ICCV 2019',
    ),
    'lwf': ('Li & Hoiem', 'Learning without Forgetting', 'ECCV 2016'),
    'stochnorm': ('Kou, You, Long, Wang', 'Stochastic Normalization', 'NeurIPS 2020'),
    'cotuning': ('You, Kou, Long, Wang', 'Co-Tuning for Transfer Learning', 'NeurIPS 2020'),
    'bituning': (
        'Zhong, Wang, Kou, Long',
        'Bi-tuning of Pre-trained Representations',
        'arXiv 2011.06182',
    ),
    'rifle': (
        'Li, Xiong, An, Xu, Dou',
        'RIFLE: Backpropagation in Depth for Deep Transfer Learning through Re-Initializing the '
        'Fully-connected LayEr',
        'ICML 2020',
    ),
    'smile': (
        'Li, Xiong, Xu, Dou',
        'SMILE: Self-Distilled Mixup for Efficient Transfer Learning',
        'arXiv 2103.13941',
    ),
    'mars': (
        'Gouk, Hospedales, Pontil',
        'Distance-Based Regularisation of Deep Networks for Fine-Tuning',
        'ICLR 2021',
    ),
    'mmd': (
        'Gretton, Borgwardt, Rasch, Schölkopf, Smola',
        'A Kernel Two-Sample Test',
        'JMLR 2012',
    ),
}


def reference(method: str) -> str | None:
    """The paper of a method in one line; None for one that is not built in.

    >>> reference('lwf')
    'Li & Hoiem, "Learning without Forgetting", ECCV 2016'
    """
    if method not in PAPERS:
        return None
    authors, title, where = PAPERS[method]
    return f'{authors}, "{title}", {where}'
