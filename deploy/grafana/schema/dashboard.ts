import type * as grafana from "@grafana/schema/dist/types/raw/dashboard/x/types.gen";
import type * as statetimeline from "@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/types.gen";
import type * as stat from "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen";
import type * as table from "@grafana/schema/dist/types/raw/composable/table/panelcfg/x/types.gen";
import type * as timeseries from "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen";

// Grafana types a panel's options and custom field config as any record: here they are its plugin's.
interface Of<Type, Options, Custom> extends Omit<grafana.Panel, "type" | "options" | "fieldConfig"> {
    type: Type;
    options: Options;
    fieldConfig: {
        defaults: Omit<grafana.FieldConfig, "custom"> & { custom?: Partial<Custom> };
        overrides: grafana.FieldConfigSource["overrides"];
    };
}

type Panel =
    | Of<"stat", stat.Options, Record<string, never>>
    | Of<"state-timeline", statetimeline.Options, statetimeline.FieldConfig>
    | Of<"table", table.Options, table.FieldConfig>
    | Of<"timeseries", timeseries.Options, timeseries.FieldConfig>;

export interface Dashboard extends Omit<grafana.Dashboard, "panels"> {
    panels: Array<Panel | grafana.RowPanel>;
}
