from django.db import transaction

from shop.models import Order
from shop.tasks import move_stock, receipt


def take_order(item, quantity):
    with transaction.atomic():
        order = Order.objects.create(item_id=item, quantity=quantity)
        receipt.delay(order.id)
        move_stock.delay(order.id)
    return order
