package otelsmtprelay

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/smtprelay/smtprelay"
)

const scope = "github.com/smtprelay/smtprelay/otelsmtprelay"

// Attributes without a convention of OpenTelemetry's. Each is on spans, events or metrics, as the package comment says.
const (
	keyName       = attribute.Key("smtprelay.name")
	keyOutcome    = attribute.Key("smtprelay.outcome")
	keyScope      = attribute.Key("smtprelay.scope")
	keyStep       = attribute.Key("smtprelay.step")
	keyCode       = attribute.Key("smtprelay.reply.code")
	keyEnhanced   = attribute.Key("smtprelay.reply.enhanced_code")
	keyWords      = attribute.Key("smtprelay.reply.text")
	keyAttempt    = attribute.Key("smtprelay.attempt")
	keyAttempts   = attribute.Key("smtprelay.attempts")
	keyRecipients = attribute.Key("smtprelay.recipient.count")
	keyRefused    = attribute.Key("smtprelay.recipient.missed")
	keyQueueID    = attribute.Key("smtprelay.queue_id")
	keyFrom       = attribute.Key("smtprelay.from")
	keyTo         = attribute.Key("smtprelay.to")
	keyConn       = attribute.Key("smtprelay.connection.id")
	keyMessages   = attribute.Key("smtprelay.connection.messages")
	keyOverlapped = attribute.Key("smtprelay.connection.overlapped")
	keyState      = attribute.Key("smtprelay.connection.state")
	keyWait       = attribute.Key("smtprelay.wait")
	keyReason     = attribute.Key("smtprelay.close.reason")
	keyLesson     = attribute.Key("smtprelay.lesson")
	keyTLSVersion = attribute.Key("tls.protocol.version")
	keyTLSResumed = attribute.Key("tls.resumed")
)

// An Option of [NewTrace] or [Observe].
type Option func(*options)

type options struct {
	tracers   trace.TracerProvider
	meters    metric.MeterProvider
	addresses bool
}

func newOptions(opts []Option) options {
	o := options{tracers: otel.GetTracerProvider(), meters: otel.GetMeterProvider()}
	for _, set := range opts {
		set(&o)
	}
	return o
}

// WithTracerProvider sets whose tracer makes the spans. The default is the global provider.
func WithTracerProvider(p trace.TracerProvider) Option { return func(o *options) { o.tracers = p } }

// WithMeterProvider sets whose meter makes the metrics. The default is the global provider.
func WithMeterProvider(p metric.MeterProvider) Option { return func(o *options) { o.meters = p } }

// WithAddresses adds to spans what may name persons: sender and recipients (smtprelay.from, smtprelay.to), the words of the
// relay's replies (smtprelay.reply.text), and the whole text of an error as the span's description. Metrics never have them.
func WithAddresses() Option { return func(o *options) { o.addresses = true } }

// NewTrace returns a Trace for [smtprelay.Config.Trace] that makes spans and metrics. One Trace may serve several Clients. If the
// meter refuses an instrument, OpenTelemetry's error handler gets the error, and the others work.
func NewTrace(opts ...Option) *smtprelay.Trace {
	o := newOptions(opts)
	t := &telemetry{
		addresses: o.addresses,
		tracer:    o.tracers.Tracer(scope, trace.WithSchemaURL(semconv.SchemaURL)),
	}
	t.instruments(o.meters.Meter(scope, metric.WithSchemaURL(semconv.SchemaURL)))
	return &smtprelay.Trace{
		SendStart:  t.sendStart,
		SendDone:   t.sendDone,
		DialDone:   t.dialDone,
		GotConn:    t.gotConn,
		Reply:      t.reply,
		Retry:      t.retry,
		ConnClosed: t.connClosed,
		Learned:    t.learned,
	}
}

// telemetry is what the hooks of one Trace share.
type telemetry struct {
	addresses bool
	tracer    trace.Tracer
	servers   sync.Map // of server to attribute.Set: see of

	messages, recipients, closed, retries, lessons metric.Int64Counter
	sending, waiting, connecting                   metric.Float64Histogram
}

// The boundaries of the histograms, in seconds. A message on a busy connection takes one round trip; a relay that scans takes
// seconds, and the default time limits are minutes.
var (
	sendSeconds = []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300}
	waitSeconds = []float64{0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120}
)

func (t *telemetry) instruments(m metric.Meter) {
	counter := func(name, unit, description string) metric.Int64Counter {
		c, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(description))
		handle(err)
		return c
	}
	histogram := func(name, description string, bounds []float64) metric.Float64Histogram {
		h, err := m.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(description), metric.WithExplicitBucketBoundaries(bounds...))
		handle(err)
		return h
	}
	t.messages = counter("smtprelay.messages", "{message}", "Messages whose Send has ended.")
	t.recipients = counter("smtprelay.recipients", "{recipient}", "Recipients of the messages whose Send has ended.")
	t.closed = counter("smtprelay.connection.closed", "{connection}", "Connections closed.")
	t.retries = counter("smtprelay.retries", "{attempt}", "Further tries of messages.")
	t.lessons = counter("smtprelay.lessons", "{lesson}", "What was learnt about the relay.")
	t.sending = histogram("smtprelay.send.duration", "Duration of Send.", sendSeconds)
	t.waiting = histogram("smtprelay.wait.duration", "How long a try of a message waited for a connection.", waitSeconds)
	t.connecting = histogram("smtprelay.connect.duration", "How long it took until a connection was ready or had failed.", sendSeconds)
}

func handle(err error) {
	if err != nil {
		otel.Handle(err)
	}
}

// sendKey is the key of a Send's span in its context. It tells the span from one of the caller's own, which events of a Ping
// must not get.
type sendKey struct{}

func spanOf(ctx context.Context) trace.Span {
	span, _ := ctx.Value(sendKey{}).(trace.Span)
	if span == nil || !span.IsRecording() {
		return nil
	}
	return span
}

func (t *telemetry) sendStart(ctx context.Context, i smtprelay.SendStartInfo) context.Context {
	ctx, span := t.tracer.Start(ctx, "smtp send", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(t.of(i.Name, i.Addr).span...))
	if span.IsRecording() {
		span.SetAttributes(keyRecipients.Int(len(i.Message.To)))
		if t.addresses {
			span.SetAttributes(keyFrom.String(i.Message.From), keyTo.StringSlice(i.Message.To))
		}
	}
	return context.WithValue(ctx, sendKey{}, span)
}

func (t *telemetry) sendDone(ctx context.Context, i smtprelay.SendDoneInfo) {
	at := t.of(i.Name, i.Addr)
	outcome := outcomes[smtprelay.OutcomeOf(i.Err)]
	t.sending.Record(ctx, i.Took.Seconds(), at.metric, metric.WithAttributes(outcome))
	if i.Err == nil {
		t.messages.Add(ctx, 1, at.metric, metric.WithAttributes(outcome))
	} else {
		t.messages.Add(ctx, 1, at.metric, metric.WithAttributes(outcome, errorType(i.Err)))
	}
	var fates [3]int64
	for _, r := range i.Receipt.Recipients {
		if r.Outcome >= 0 && int(r.Outcome) < len(fates) {
			fates[r.Outcome]++
		}
	}
	for fate, n := range fates {
		if n > 0 {
			t.recipients.Add(ctx, n, at.metric, metric.WithAttributes(outcomes[fate]))
		}
	}
	span, _ := ctx.Value(sendKey{}).(trace.Span)
	if span == nil {
		return
	}
	if span.IsRecording() {
		span.SetAttributes(outcome)
		if i.Receipt.QueueID != "" {
			span.SetAttributes(keyQueueID.String(i.Receipt.QueueID))
		}
		if i.Err != nil {
			span.SetAttributes(keyRefused.Int64(fates[smtprelay.NotAccepted] + fates[smtprelay.Unknown]))
			t.fail(span, i.Err)
		} else if i.Receipt.Reply.Code != 0 {
			span.SetAttributes(keyCode.Int(i.Receipt.Reply.Code))
		}
	}
	span.End()
}

func (t *telemetry) dialDone(ctx context.Context, i smtprelay.DialDoneInfo) {
	at := t.of(i.Name, i.Addr)
	if i.Err == nil {
		t.connecting.Record(ctx, i.Took.Seconds(), at.metric)
	} else {
		t.connecting.Record(ctx, i.Took.Seconds(), at.metric, metric.WithAttributes(errorType(i.Err)))
	}
	now := time.Now()
	_, span := t.tracer.Start(ctx, "smtp connect", trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(now.Add(-i.Took)), trace.WithAttributes(at.span...))
	if span.IsRecording() {
		span.SetAttributes(keyConn.Int64(i.Conn))
		if i.TLSVersion != 0 {
			version := strings.TrimPrefix(tls.VersionName(i.TLSVersion), "TLS ") // "1.3", as the convention has it
			span.SetAttributes(keyTLSVersion.String(version), keyTLSResumed.Bool(i.Resumed))
		}
		if i.Err != nil {
			t.fail(span, i.Err)
		}
	}
	span.End(trace.WithTimestamp(now))
}

func (t *telemetry) gotConn(ctx context.Context, i smtprelay.GotConnInfo) {
	t.waiting.Record(ctx, i.Waited.Seconds(), t.of(i.Name, i.Addr).metric)
	if span := spanOf(ctx); span != nil {
		span.AddEvent("smtprelay.connection", trace.WithAttributes(
			keyConn.Int64(i.Conn), keyMessages.Int(i.Messages), keyOverlapped.Bool(i.Overlapped), keyWait.Float64(i.Waited.Seconds())))
	}
}

func (t *telemetry) reply(ctx context.Context, i smtprelay.ReplyInfo) {
	span := spanOf(ctx)
	if span == nil || i.Op == smtprelay.OpRcpt && i.Reply.Code < 400 { // a message may have a thousand of these
		return
	}
	span.AddEvent("smtprelay.reply", trace.WithAttributes(append(t.replyAttrs(i.Reply), keyStep.String(string(i.Op)), keyConn.Int64(i.Conn))...))
}

func (t *telemetry) retry(ctx context.Context, i smtprelay.RetryInfo) {
	t.retries.Add(ctx, 1, t.of(i.Name, i.Addr).metric, metric.WithAttributes(errorType(i.Err)))
	if span := spanOf(ctx); span != nil {
		span.AddEvent("smtprelay.retry", trace.WithAttributes(append(t.errorAttrs(i.Err), errorType(i.Err),
			keyAttempt.Int(i.Attempt), keyWait.Float64(i.Wait.Seconds()))...))
	}
}

func (t *telemetry) connClosed(ctx context.Context, i smtprelay.ConnClosedInfo) {
	t.closed.Add(ctx, 1, t.of(i.Name, i.Addr).metric, metric.WithAttributes(keyReason.String(i.Reason)))
}

func (t *telemetry) learned(ctx context.Context, i smtprelay.LearnedInfo) {
	t.lessons.Add(ctx, 1, t.of(i.Name, i.Addr).metric, metric.WithAttributes(keyLesson.String(string(i.Lesson))))
}

// fail says on span why it has failed.
func (t *telemetry) fail(span trace.Span, err error) {
	kind := errorType(err)
	span.SetAttributes(append(t.errorAttrs(err), kind)...)
	description := kind.Value.AsString()
	if e, ok := errors.AsType[*smtprelay.Error](err); ok {
		span.SetAttributes(keyScope.String(e.Scope.String()), keyAttempts.Int(e.Attempts))
		if e.Reply.Code != 0 {
			description = string(e.Op) + ": " + description
		}
	}
	if t.addresses {
		description = err.Error()
	}
	span.SetStatus(codes.Error, description)
}

// errorAttrs is the step and the reply of err.
func (t *telemetry) errorAttrs(err error) []attribute.KeyValue {
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		return nil
	}
	attrs := make([]attribute.KeyValue, 0, 8)
	attrs = append(attrs, keyStep.String(string(e.Op)))
	if e.Reply.Code != 0 {
		attrs = append(attrs, t.replyAttrs(e.Reply)...)
	}
	return attrs
}

func (t *telemetry) replyAttrs(r smtprelay.Reply) []attribute.KeyValue {
	attrs := make([]attribute.KeyValue, 0, 6)
	attrs = append(attrs, keyCode.Int(r.Code))
	if r.EnhancedCode != (smtprelay.EnhancedCode{}) {
		attrs = append(attrs, keyEnhanced.String(r.EnhancedCode.String()))
	}
	if t.addresses {
		attrs = append(attrs, keyWords.String(r.String()))
	}
	return attrs
}

// errorType is the attribute error.type: the code of the relay's reply or, where there was none, the step.
func errorType(err error) attribute.KeyValue {
	e, ok := errors.AsType[*smtprelay.Error](err)
	switch {
	case !ok:
		return semconv.ErrorTypeOther
	case e.Reply.Code != 0:
		return semconv.ErrorTypeKey.String(strconv.Itoa(e.Reply.Code))
	}
	return semconv.ErrorTypeKey.String(string(e.Op))
}

// outcomes is the attribute smtprelay.outcome by [smtprelay.Outcome].
var outcomes = [...]attribute.KeyValue{
	smtprelay.Unknown:     keyOutcome.String("unknown"),
	smtprelay.Accepted:    keyOutcome.String("accepted"),
	smtprelay.NotAccepted: keyOutcome.String("not_accepted"),
}

// server is what tells one Client's relay from another's.
type server struct{ name, addr string }

// attrs are the attributes of a server, for spans and for metrics.
type attrs struct {
	span   []attribute.KeyValue
	metric metric.MeasurementOption
}

// of returns the attributes of a server. They are made once: a Trace serves few Clients.
func (t *telemetry) of(name, addr string) *attrs {
	if known, ok := t.servers.Load(server{name, addr}); ok {
		return known.(*attrs)
	}
	list := serverAttrs(name, addr)
	known, _ := t.servers.LoadOrStore(server{name, addr}, &attrs{
		span:   append(list[:len(list):len(list)], semconv.NetworkProtocolName("smtp")),
		metric: metric.WithAttributeSet(attribute.NewSet(list...)),
	})
	return known.(*attrs)
}

func serverAttrs(name, addr string) []attribute.KeyValue {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	list := []attribute.KeyValue{semconv.ServerAddress(host)}
	if n, err := strconv.Atoi(port); err == nil {
		list = append(list, semconv.ServerPort(n))
	}
	if name != "" {
		list = append(list, keyName.String(name))
	}
	return list
}
