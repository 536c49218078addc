"""Objects365 v2 as the published recipe prepares it.

Images with a long side above 640 px are resized down; part of the validation
images joins the training set, 5000 stay. A leaf puts these values into the COCO
data loaders by `update`.
"""

data_root = 'data/objects365/'
objects365_train = dict(
    data_root=data_root,
    ann_file='annotations/new_zhiyuan_objv2_train_resized.json',
    data_prefix=dict(img='train/'),
    label_from_category_id=True,
)
objects365_val = dict(
    data_root=data_root,
    ann_file='annotations/new_zhiyuan_objv2_val_resized.json',
    data_prefix=dict(img='val/'),
    label_from_category_id=True,
)
objects365_ann_file = data_root + 'annotations/new_zhiyuan_objv2_val_resized.json'
