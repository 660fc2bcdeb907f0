package otelsmtprelay

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/smtprelay/smtprelay"
)

// Observe makes the meter ask client for its connections and waiting Sends whenever metrics are read. smtprelay.name distinguishes
// Clients, so several need a Config.Name each. Unregister ends it; a Client that was shut down has no connections.
func Observe(client *smtprelay.Client, opts ...Option) (metric.Registration, error) {
	m := newOptions(opts).meters.Meter(scope, metric.WithSchemaURL(semconv.SchemaURL))
	connections, err1 := m.Int64ObservableGauge("smtprelay.connections", metric.WithUnit("{connection}"), metric.WithDescription("Connections open or being opened."))
	most, err2 := m.Int64ObservableGauge("smtprelay.connections.max", metric.WithUnit("{connection}"), metric.WithDescription("Connections that may be open."))
	waiting, err3 := m.Int64ObservableGauge("smtprelay.waiting", metric.WithUnit("{message}"), metric.WithDescription("Sends that wait for a connection."))
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	state := func(name, state string) metric.ObserveOption {
		return metric.WithAttributeSet(attribute.NewSet(append(nameAttr(name), keyState.String(state))...))
	}
	return m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := client.Stats()
		o.ObserveInt64(connections, int64(s.IdleConns), state(s.Name, "idle"))
		o.ObserveInt64(connections, int64(s.OpenConns-s.IdleConns), state(s.Name, "used"))
		named := metric.WithAttributes(nameAttr(s.Name)...)
		o.ObserveInt64(most, int64(s.MaxConns), named)
		o.ObserveInt64(waiting, int64(s.Waiting), named)
		return nil
	}, connections, most, waiting)
}

func nameAttr(name string) []attribute.KeyValue {
	if name == "" {
		return nil
	}
	return []attribute.KeyValue{keyName.String(name)}
}
