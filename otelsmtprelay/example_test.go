// Examples of how a service with OpenTelemetry uses the package.
package otelsmtprelay_test

import (
	"context"
	"fmt"
	"log"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/otelsmtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mail that is sent in the course of an order is a span under the order's.
func ExampleNewTrace() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	spans := tracetest.NewInMemoryExporter() // in place of what exports to a collector
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))

	cfg := relay.Config()
	cfg.Trace = otelsmtprelay.NewTrace(otelsmtprelay.WithTracerProvider(provider)) // the global one needs no option
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, order := provider.Tracer("shop").Start(context.Background(), "order")
	_, err = client.Send(ctx, smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("Subject: Your order\r\n\r\nIt is ready.\r\n")),
	})
	order.End()
	fmt.Println(err)
	for _, s := range spans.GetSpans() {
		fmt.Println(s.Name, s.SpanKind, s.Parent.HasSpanID())
	}
	// Output:
	// <nil>
	// smtp connect client true
	// smtp send client true
	// order internal false
}

// Connections and waiting Sends are read when metrics are.
func ExampleObserve() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	reg, err := otelsmtprelay.Observe(client)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reg.Unregister())
	// Output:
	// <nil>
}
