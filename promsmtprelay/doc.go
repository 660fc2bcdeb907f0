// Package promsmtprelay gives Prometheus the metrics of [smtprelay.Client]s.
//
//	metrics := promsmtprelay.New()
//	prometheus.MustRegister(metrics)
//
//	cfg.Trace = metrics.Trace() // durations and errors, recorded as they happen
//	client, err := smtprelay.New(cfg)
//	metrics.Watch(client)       // the Client's own counters, read at each scrape
//
// A [Metrics] serves any number of Clients. The label "client" is Config.Name; Clients of one name are added up.
// [smtprelay.MultiTrace] joins the Trace with another one. No label has an address or the words of a relay, and each label has few
// values.
//
// # Metrics
//
// From Watch:
//
//	smtprelay_messages_total{outcome}            counter    messages: accepted (for one recipient at least), not_accepted, unknown
//	smtprelay_recipients_refused_total           counter    recipients refused
//	smtprelay_connections{state}                 gauge      connections: idle, or used (being opened included)
//	smtprelay_connections_limit                  gauge      connections that may be open, as configured or as learnt
//	smtprelay_waiting_sends                      gauge      Sends that wait for a connection
//	smtprelay_waits_total                        counter    connections waited for
//	smtprelay_wait_seconds_total                 counter    total time of these waits
//	smtprelay_retries_total                      counter    retries of messages
//	smtprelay_overlapped_total                   counter    transactions begun before the previous one had its final reply
//	smtprelay_dials_total{result}                counter    connections tried: ok, failed
//	smtprelay_auths_total{result}                counter    AUTH commands: ok, failed
//	smtprelay_connections_closed_total{reason}   counter    connections closed: full, age, idle, fault
//
// From Trace:
//
//	smtprelay_send_duration_seconds{outcome}     histogram  duration of Send
//	smtprelay_wait_duration_seconds              histogram  how long an attempt waited for a connection
//	smtprelay_dial_duration_seconds{result}      histogram  how long it took until a connection was ready or had failed
//	smtprelay_errors_total{step,code}            counter    failed Sends by step, an [smtprelay.Op], and code of the reply; "" where none
//	smtprelay_lessons_total{lesson}              counter    what was learnt about the relay, an [smtprelay.Lesson]
//
// grafana/dashboard.json, beside this package, is a Grafana dashboard of all of them.
package promsmtprelay
