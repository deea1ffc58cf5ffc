from django.db import models


class Stock(models.Model):
    item = models.CharField(max_length=100, primary_key=True)
    quantity = models.IntegerField()


class Order(models.Model):
    item = models.ForeignKey(Stock, on_delete=models.PROTECT)
    quantity = models.PositiveIntegerField()


class Receipt(models.Model):
    """Nothing here forbids two receipts for an order: that there is one comes from the tasks alone."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="receipts")
    sent_at = models.DateTimeField(auto_now_add=True)


class Move(models.Model):
    """What has left the store; as with receipts, nothing here forbids two for an order."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="moves")
    quantity = models.PositiveIntegerField()
