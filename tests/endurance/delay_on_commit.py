"""Takes orders in ``examples/django_shop`` as one does with a broker: the tasks are sent after the commit."""

import django
from django.db import transaction

django.setup()

from shop.models import Order  # noqa: E402 (after setup)
from shop.tasks import move_stock, receipt  # noqa: E402

while True:
    with transaction.atomic():
        order = Order.objects.create(item_id="tea", quantity=1)
        receipt.delay_on_commit(order.id)
        move_stock.delay_on_commit(order.id)
