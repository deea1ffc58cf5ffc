import django.db.models.deletion
from django.db import migrations, models


def fill(apps, schema_editor):
    apps.get_model("shop", "Stock").objects.create(item="tea", quantity=100_000)


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            name="Stock",
            fields=[
                ("item", models.CharField(max_length=100, primary_key=True, serialize=False)),
                ("quantity", models.IntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("quantity", models.PositiveIntegerField()),
                ("item", models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, to="shop.stock")),
            ],
        ),
        *(
            migrations.CreateModel(
                name=name,
                fields=[
                    (
                        "id",
                        models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                    ),
                    field,
                    (
                        "order",
                        models.ForeignKey(
                            on_delete=django.db.models.deletion.CASCADE, related_name=related, to="shop.order"
                        ),
                    ),
                ],
            )
            for name, related, field in (
                ("Receipt", "receipts", ("sent_at", models.DateTimeField(auto_now_add=True))),
                ("Move", "moves", ("quantity", models.PositiveIntegerField())),
            )
        ),
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]
