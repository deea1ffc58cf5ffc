from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from shop.orders import take_order


@csrf_exempt  # so that curl can order
@require_POST
def orders(request):
    order = take_order(request.POST["item"], int(request.POST.get("quantity", 1)))
    return JsonResponse({"order": order.id})
