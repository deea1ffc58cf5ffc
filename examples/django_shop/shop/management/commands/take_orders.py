from django.core.management.base import BaseCommand

from shop.orders import take_order


class Command(BaseCommand):
    help = "Take so many orders, one after the other."

    def add_arguments(self, parser):
        parser.add_argument("number", type=int)

    def handle(self, number, **options):
        for one in range(number):
            take_order("tea", 1 + one % 3)
        self.stdout.write(f"{number} orders taken")
