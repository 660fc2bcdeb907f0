// Package otelsmtprelay reports to OpenTelemetry what a [smtprelay.Client] does: a span for each Send, and metrics.
//
//	cfg.Trace = otelsmtprelay.NewTrace()          // spans, histograms and counters, as things happen
//	client, err := smtprelay.New(cfg)
//	…
//	reg, err := otelsmtprelay.Observe(client)     // connections and waiting Sends, when metrics are read
//	defer reg.Unregister()
//
// Without options both use the global providers. [smtprelay.MultiTrace] joins the Trace with another, such as LogTrace.
//
// # Spans
//
// Each Send has one span of kind CLIENT, "smtp send", a child of the span in the context that Send was given. Its events say what
// happened on the way: a connection was taken ("smtprelay.connection"), the relay answered ("smtprelay.reply", with the step; of
// the replies to RCPT only the refusals), the message is tried again ("smtprelay.retry"). The opening of a connection has a span of
// its own, "smtp connect": a child of the Send that it was begun for. It may outlive that Send, since connections are shared. A
// span that fails has the attribute error.type: the code of the relay's reply, or else the step, an [smtprelay.Op].
//
// # Metrics
//
//	smtprelay.messages          counter    messages by smtprelay.outcome and error.type
//	smtprelay.recipients        counter    recipients by smtprelay.outcome
//	smtprelay.send.duration     histogram  seconds of Send, by smtprelay.outcome
//	smtprelay.wait.duration     histogram  seconds that an attempt waited for a connection
//	smtprelay.connect.duration  histogram  seconds until a connection was ready; its count is that of dials; by error.type
//	smtprelay.connection.closed counter    connections closed, by smtprelay.close.reason
//	smtprelay.retries           counter    retries of messages, by error.type
//	smtprelay.lessons           counter    what was learnt about the relay, by smtprelay.lesson
//	smtprelay.connections       gauge      connections by smtprelay.connection.state: idle or used        (Observe)
//	smtprelay.connections.max   gauge      how many may be open, as configured or as learnt               (Observe)
//	smtprelay.waiting           gauge      Sends that wait for a connection                               (Observe)
//
// smtprelay.outcome is "accepted" (for one recipient at least), "not_accepted" or "unknown". If Config.Name is set, all metrics
// have it as smtprelay.name; all but those of Observe have server.address and server.port. No attribute has many values.
//
// # Privacy
//
// Mail addresses, the words of the relay and errors that may quote either are exported only with [WithAddresses]. The content of a
// message is never exported.
package otelsmtprelay
