from celery import shared_task
from django.db.models import F

from shop.models import Move, Order, Receipt, Stock


@shared_task(transaction="default")
def receipt(order_id):
    Receipt.objects.create(order_id=order_id)


@shared_task(transaction="default")
def move_stock(order_id):
    order = Order.objects.get(id=order_id)
    Stock.objects.filter(pk=order.item_id).update(quantity=F("quantity") - order.quantity)
    Move.objects.create(order=order, quantity=order.quantity)
