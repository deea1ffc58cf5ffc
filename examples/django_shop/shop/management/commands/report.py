from django.core.management.base import BaseCommand
from django.db.models import Sum

from shop.models import Move, Order, Receipt, Stock


class Command(BaseCommand):
    help = "Count what was ordered, what was sent, and what has left the store."

    def handle(self, **options):
        self.stdout.write(f"orders: {Order.objects.count()}")
        self.stdout.write(f"receipts: {Receipt.objects.count()}")
        self.stdout.write(f"moves: {Move.objects.count()}")
        ordered = Order.objects.aggregate(sum=Sum("quantity", default=0))["sum"]
        self.stdout.write(f"tea in stock and ordered: {Stock.objects.get(item='tea').quantity + ordered}")
